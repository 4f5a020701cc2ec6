// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process with rights, which gives devices to VMMs that have none.
//!
//! ```text
//! manager regbank.bpf.o /run/manager
//! ```
//!
//! Each VMM that connects gets programs and maps of its own. One that then sends back what it runs
//! gets what is in the file by then, with the running maps. The programs stay as long as a VMM has
//! them; this process keeps nothing.

use std::error::Error;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use kvm_bpf::{Abi, OnLoss, OpenImage, Programs, transfer};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, socket] = &args[..] else {
        return Err("usage: manager FILE SOCKET".into());
    };
    let abi = Abi::from_running_kernel()?;
    let listener = UnixListener::bind(socket)?;
    thread::scope(|scope| {
        for stream in listener.incoming() {
            let stream = stream?;
            scope.spawn(move || {
                if let Err(error) = serve(&stream, Path::new(file), &abi) {
                    eprintln!("{file}: {error:#?}");
                }
            });
        }
        Ok(())
    })
}

/// Serves one VMM until it goes.
fn serve(stream: &UnixStream, file: &Path, abi: &Abi) -> Result<(), Box<dyn Error>> {
    let open = || {
        let mut image = OpenImage::open_file(file)?;
        image.set_abi(abi);
        Ok::<_, kvm_bpf::image::Error>(image)
    };
    open()?.load()?.send(stream)?;
    loop {
        let running = match Programs::recv(stream) {
            Err(transfer::Error::Receive(_)) => return Ok(()),
            running => running?,
        };
        let mut next = open()?;
        let changes = next.reuse_maps(&running, OnLoss::Refuse)?;
        next.load()?.send(stream)?;
        println!("{}: {changes}", file.display());
    }
}
