// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Control groups (cgroup v2) of a test.

use std::fs;
use std::path::{Path, PathBuf};

/// One below the root, removed when dropped: its processes have to be gone.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one with a controller, as `cpu`.
    #[track_caller]
    pub fn new(name: &str, controller: &str) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(
            root.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .unwrap_or_else(|error| panic!("the controller {controller}: {error}"));
        let path = root.join(name);
        fs::create_dir(&path).expect("a cgroup");
        Cgroup(path)
    }

    /// Moves this process to it.
    #[track_caller]
    pub fn join(&self) {
        self.write("cgroup.procs", 0);
    }

    /// What a file of it says.
    #[track_caller]
    pub fn read(&self, file: &str) -> String {
        let text = fs::read_to_string(self.0.join(file));
        text.unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// Sets what a file of it is for.
    #[track_caller]
    pub fn write(&self, file: &str, text: impl ToString) {
        let written = fs::write(self.0.join(file), text.to_string());
        written.unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// The number behind a word of a file that has a line for each.
    #[track_caller]
    pub fn number(&self, file: &str, name: &str) -> u64 {
        let text = self.read(file);
        let number = text.lines().find_map(|line| {
            let (word, number) = line.split_once(' ')?;
            (word == name).then(|| number.parse().ok())?
        });
        number.unwrap_or_else(|| panic!("wanted {name}, got {text:?}"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
