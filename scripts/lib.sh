# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# What the scripts share; sourced by them, not run.

set -euo pipefail

# Where depmod is, which a user's PATH may lack.
PATH=$PATH:/usr/sbin:/sbin
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Scripts call each other from other directories.
for name in KVM_BPF_CACHE KVM_BPF_LINUX KVM_BPF_BUSYBOX; do
	[[ -z ${!name:-} ]] || export "$name=$(realpath -m "${!name}")"
done
unset name
CACHE=${KVM_BPF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvm-bpf}
# The kernel's git tree: base and series.
# shellcheck disable=SC2034
TREE=$CACHE/linux
LOGS=$CACHE/log
# shellcheck disable=SC2034
JOBS=${KVM_BPF_JOBS:-$(nproc)}
export KVM_BPF_CACHE=$CACHE
# Text is compared and sorted, never shown to a person by locale.
export LC_ALL=C
mkdir -p "$CACHE" "$LOGS"

say() { printf '%s\n' "$*"; }
warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
	warn "$@"
	exit 1
}

# What a script has called may take the signal as a reason to end like any other.
trap 'exit 130' INT TERM

# usage FILE: the comment block at the top of FILE, which is its manual.
usage() {
	awk 'NR > 2 && !/^#/ { exit } NR > 3 { sub(/^# ?/, ""); print }' "$1"
}

have() { command -v "$1" >/dev/null 2>&1; }

# newer WANTED FOUND: is FOUND at least WANTED?
newer() {
	[[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]
}

machine_arch() {
	case $(uname -m) in
	aarch64) say arm64 ;;
	*) uname -m ;;
	esac
}

check_arch() {
	case $1 in
	x86_64 | arm64) ;;
	*) die "unknown architecture '$1': x86_64 or arm64" ;;
	esac
}

# Where things of an architecture (programs, headers, initramfs) and of one
# kernel (image, modules) are kept.
out_dir() { say "$CACHE/out/$1"; }
kernel_dir() { say "$CACHE/out/$1-$2"; }

# kernel_image ARCH: what boots, in arch/*/boot.
kernel_image() {
	case $1 in
	x86_64) say bzImage ;;
	arm64) say Image ;;
	esac
}

# What takes long, in minutes on the two processors that CI has: all that is fetched and
# installed first, a kernel's first build, and that of the programs that run on it.
# shellcheck disable=SC2034
FETCH_MINUTES=3 TOOLS_MINUTES=6 BUILD_MINUTES=11 DEBUG_BUILD_MINUTES=30 USER_MINUTES=2

# step WHAT MINUTES: a line of a plan, whose total is the caller's.
step() {
	say "  $1: $2 minute$( (($2 == 1)) || say s)"
	total=$((total + $2))
}

# step_builds ARCH VARIANT: what will be built for a host, unless the caller has $seen it.
step_builds() {
	if [[ $seen != *" $1-$2 "* ]]; then
		seen+="$1-$2 "
		step_kernel "$1" "$2"
	fi
	if [[ $seen != *" $1-user "* ]]; then
		seen+="$1-user "
		[[ -d $(out_dir "$1")/bin ]] || step "user space for $1" $USER_MINUTES
	fi
}

# step_kernel ARCH VARIANT: one that was built of something else than is there now needs
# no more than a first build.
step_kernel() {
	local stamp what
	stamp=$(kernel_dir "$1" "$2")/stamp
	what="the $1 kernel ($2)"
	if [[ -f $stamp ]]; then
		[[ $(sed -n 2p "$stamp") != "$(kernel_recipe "$1" "$2")" ]] || return 0
		what+=', as the series or its options have changed, at most'
	fi
	step "$what" "$(build_minutes "$2")"
}

build_minutes() { # VARIANT
	if [[ $1 == debug ]]; then
		say $DEBUG_BUILD_MINUTES
	else
		say $BUILD_MINUTES
	fi
}

elapsed() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# progress TITLE LOG COMMAND...: run COMMAND with its output in LOG and show how
# far it is, by the lines that look like build steps against their number last
# time.  On failure show the end of LOG.
progress() {
	local title=$1 log=$2 pid status=0 steps=0 last=0 total bar
	local start=$SECONDS shown=$SECONDS
	shift 2
	mkdir -p "${log%/*}"
	total=$(cat "$log.steps" 2>/dev/null || say 0)
	say "$title: log in $log"
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	# shellcheck disable=SC2064 # this pid, now
	trap "kill $pid 2>/dev/null || true; exit 130" INT TERM
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.3
		if [[ -t 1 ]]; then
			((SECONDS == last)) && continue
		else
			((SECONDS - shown < 30)) && continue
			shown=$SECONDS
		fi
		last=$SECONDS
		steps=$(grep -cE '^ +[A-Z]' "$log" || true)
		bar="$steps steps"
		if ((total > 0)); then
			bar="$steps/$total steps, $((steps < total ? steps * 100 / total : 99))%"
		fi
		if [[ -t 1 ]]; then
			printf '\r\033[K%s: %s, %s' "$title" "$bar" "$(elapsed $((SECONDS - start)))"
		else
			say "$title: $bar, $(elapsed $((SECONDS - start)))"
		fi
	done
	wait "$pid" || status=$?
	trap 'exit 130' INT TERM
	[[ -t 1 ]] && printf '\r\033[K'
	if ((status)); then
		tail -n 40 "$log" >&2
		warn "$title failed (status $status) after $(elapsed $((SECONDS - start))); the whole log is $log"
		return "$status"
	fi
	steps=$(grep -cE '^ +[A-Z]' "$log" || true)
	# A short incremental run says nothing about a whole one.
	if ((steps * 2 > total)); then say "$steps" >"$log.steps"; fi
	say "$title: done, $(elapsed $((SECONDS - start)))"
}

# llvm_suffix: what follows "clang" in the name of the LLVM to use: the one
# KVM_BPF_LLVM names, else the newest of the tried ones.
llvm_suffix() {
	local v found
	if [[ -n ${KVM_BPF_LLVM+set} ]]; then
		have "clang$KVM_BPF_LLVM" || return 1
		say "$KVM_BPF_LLVM"
		return
	fi
	for v in -19 -21 -20 -18 -17; do
		if have "clang$v" && have "ld.lld$v" && have "llvm-objcopy$v"; then
			say "$v"
			return
		fi
	done
	if have clang && have ld.lld && have llvm-objcopy; then
		found=$(clang -dumpversion)
		if newer 17 "$found"; then
			say ""
			return
		fi
	fi
	return 1
}

rust_release() { rustc -vV | sed -n 's/^release: //p'; }

# rust_library: the sources of Rust's library, of rustc's own release.
rust_library() {
	local dir
	for dir in "$CACHE/rust-src/usr/src/rustc-$(rust_release)/library" \
		"$(rustc --print sysroot)/lib/rustlib/src/rust/library"; do
		if [[ -f $dir/core/src/lib.rs ]]; then
			say "$dir"
			return
		fi
	done
	return 1
}

# kernel_env: what every make of the kernel needs; without it CONFIG_RUST
# silently disappears.
kernel_env() {
	local suffix dir
	suffix=$(llvm_suffix) || die "no clang >= 17 with lld and llvm: run scripts/deps"
	RUST_LIB_SRC=$(rust_library) || die "no Rust library source: run scripts/deps"
	export RUST_LIB_SRC LLVM=${suffix:-1}
	for dir in "/usr/lib/llvm$suffix/lib" "$("llvm-config$suffix" --libdir 2>/dev/null || true)"; do
		if compgen -G "$dir/libclang*.so*" >/dev/null; then
			export LIBCLANG_PATH=$dir
			break
		fi
	done
	export PATH=$CACHE/bindgen/bin:$PATH
	export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_USER=kvm-bpf KBUILD_BUILD_HOST=localhost
}

# kernel_cc ARCH VARIANT: the C compiler.  gcc, as it is done sooner; clang for
# the debug kernel, since with gcc Rust and KASAN exclude each other.
kernel_cc() {
	if [[ $2 == debug ]]; then
		say "clang$(llvm_suffix)"
	else
		say "$(cross_prefix "$1")gcc"
	fi
}

# cross_prefix ARCH: of the tools for it, nothing where they are the machine's own.
cross_prefix() {
	local target
	target=$(rust_target "$1")
	[[ $1 == "$(machine_arch)" ]] || say "${target/-unknown/}-"
}

# kselftest ARCH SUITE WORD...: make with these words for the kernel's
# tools/testing/selftests/SUITE, of static programs below out/ARCH/kselftests/SUITE.
kselftest() {
	local arch=$1 to
	to=$(out_dir "$1")/kselftests/$2
	mkdir -p "$to"
	make -C "$TREE/tools/testing/selftests/$2" ARCH="$arch" CROSS_COMPILE="$(cross_prefix "$arch")" OUTPUT="$to" \
		LLVM='' USERLDFLAGS=-static KHDR_INCLUDES="-isystem $(out_dir "$arch")/headers/include" \
		-j"$JOBS" "${@:3}"
}

# libelf ARCH: where cargo has the sources of libelf and zlib, and on a second line the static
# libraries that it has made of them: a machine has them for itself at most.
libelf() {
	local file built=''
	for file in "$CACHE/target/$(rust_target "$1")"/release/build/libbpf-sys-*/output; do
		[[ $file -ot $built ]] || built=$file
	done
	sed -n 's,^cargo:rerun-if-changed=\(.*\)/zlib/zlib\.h$,\1,p' "$built"
	say "${built%/*}/out"
}

# base KEY: a line of patches/BASE.
base() { sed -n "s/^$1 //p" "$TOP/patches/BASE"; }

# rust_target ARCH
rust_target() {
	case $1 in
	arm64) say aarch64-unknown-linux-gnu ;;
	*) say "$1-unknown-linux-gnu" ;;
	esac
}

# Patches and commits made here are the same on every machine: no setting of the
# user's reaches git, and commits carry the dates and names of the patches.
git_plain() {
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
		GIT_COMMITTER_NAME=kvm-bpf GIT_COMMITTER_EMAIL=kvm-bpf@localhost git "$@"
}

# The commit below the series.
series_base() {
	git -C "$TREE" rev-parse -q --verify 'refs/tags/kvm-bpf-base^{commit}' ||
		git -C "$TREE" rev-list --max-parents=0 "${1:-HEAD}" | tail -n 1
}

# patches/series names every patch, in the order to apply them, by folder and file: a
# folder is a series of its own. scripts/series writes it.
series_patches() {
	local patch
	[[ -f $TOP/patches/series ]] || return 0
	while read -r patch; do
		say "$TOP/patches/$patch"
	done <"$TOP/patches/series"
}

# series_folder SUBJECT [FOLDER]: the folder in which patches/series has the patch of that
# subject (as git's %f writes it); one that it has not goes where the one before it is.
# A patch's file has the beginning of its subject for a name: the longest counts.
series_folder() {
	local patch slug longest=0 folder=${2:-}
	while read -r patch; do
		slug=${patch##*/[0-9][0-9][0-9][0-9]-}
		slug=${slug%.patch}
		if [[ $patch == */* && $1 == "$slug"* ]] && ((${#slug} > longest)); then
			longest=${#slug}
			folder=${patch%/*}
		fi
	done < <(cat "$TOP/patches/series" 2>/dev/null)
	[[ -n $folder ]] || die "patches/series names no folder for the first patch: $1"
	say "$folder"
}

# series_format REF DIR: what REF has above the base, as the folders of patches/ in DIR,
# and DIR/series.
series_format() {
	local from last commit subject folder='' now done=' '
	from=$(series_base "$1")
	last=$from
	mkdir -p "$2"
	: >"$2/series"
	while read -r commit subject; do
		now=$(series_folder "$subject" "$folder") || return
		if [[ $now != "$folder" ]]; then
			if [[ $done == *" $now "* ]]; then
				warn "the patches of $now are not side by side"
				return 1
			fi
			[[ -z $folder ]] || series_format_folder "$folder" "$from..$last" "$2" || return
			done+="$now "
			folder=$now
			from=$last
		fi
		last=$commit
	done < <(git -C "$TREE" log --reverse --format='%H %f' "$from..$1")
	if [[ -z $folder ]]; then
		warn "no commits above the base"
		return 1
	fi
	series_format_folder "$folder" "$from..$last" "$2"
}

series_format_folder() { # FOLDER RANGE DIR
	git_plain -C "$TREE" format-patch -q --numbered --zero-commit --no-signature --no-base \
		--abbrev=12 --find-renames --diff-algorithm=myers -o "$3/$1" "$2" || return
	(cd "$3" && printf '%s\n' "$1"/*.patch) >>"$3/series"
}

# Sign-offs are left to whoever posts the series; commits of upstream are not in the
# tree.
series_checkpatch() {
	local patches
	mapfile -t patches < <(series_patches)
	((${#patches[@]})) || return 0
	# The system's python3 has the module that checkpatch's check of SPDX lines uses.
	(cd "$TREE" && PATH=/usr/bin:$PATH ./scripts/checkpatch.pl --strict --no-signoff --quiet --show-types \
		--ignore FILE_PATH_CHANGES,UNKNOWN_COMMIT_ID "${patches[@]}")
}

# As the kernel's rustfmtcheck, which has options for nothing but the edition.
series_rustfmt() { find "$TOP/rust" -name '*.rs' -exec rustfmt --check --edition 2021 {} +; }

# What the patches amount to, in one number.
series_sum() {
	local patch
	series_patches | while read -r patch; do
		cat "$patch"
	done | sha256sum | cut -d' ' -f1
}

# kernel_fragments ARCH VARIANT: the files of options that its configuration has.
kernel_fragments() {
	say "$TOP/kconfig/common"
	say "$TOP/kconfig/$1"
	if [[ $2 != default ]]; then
		say "$TOP/kconfig/$2"
		[[ ! -f $TOP/kconfig/$1-$2 ]] || say "$TOP/kconfig/$1-$2"
	fi
}

# kernel_recipe ARCH VARIANT: what this repository says of a kernel, in one number.
kernel_recipe() {
	local files
	mapfile -t files < <(kernel_fragments "$1" "$2")
	{
		[[ $2 == base ]] || series_sum
		cat "$TOP/patches/BASE" "${files[@]}"
	} | sha256sum | cut -d' ' -f1
}

# The kernel tree's note of what was applied or exported: sum of the patches,
# commit.
series_mark() { say "$(series_sum) $(git -C "$TREE" rev-parse "$1")" >"$TREE/.git/kvm-bpf-series"; }

# The mutant that scripts/mutants has applied, after a line with the tree that it is in.
# Whoever takes it back has the lock.
MUTANT=$CACHE/mutant

# take_back: takes it out of that tree, if it is there.
take_back() {
	local tree
	[[ -f $MUTANT ]] || return 0
	read -r tree <"$MUTANT"
	! git -C "$tree" apply -R --check "$MUTANT" 2>/dev/null || git -C "$tree" apply -R "$MUTANT"
	rm "$MUTANT"
}

# What a kernel says when something is wrong, job's status or not.
SPLAT='WARNING:|BUG:|Oops|Call [Tt]race|INFO: task .* blocked|INFO: .* detected'
SPLAT+='|possible (recursive|circular|irq)|lock held when returning|suspicious RCU usage'
SPLAT+='|(RCU|rcu).* stall|soft lockup|scheduling while atomic|nobody cared'
SPLAT+='|UBSAN|KASAN|KCSAN|KFENCE|refcount_t:|list_(add|del) corruption|verifier bug'
SPLAT+='|[Kk]ernel panic|Unable to handle|general protection fault|segfault at'
SPLAT+='|EXPECTATION FAILED|ASSERTION FAILED'
SPLAT+='|unreferenced object|kmemleak: [0-9]+ new'
SPLAT+='|Out of memory'
# What it says of this CPU, not of itself.
BENIGN='WARNING: See https'
# Where it was when memory ran out; a cgroup's limit, unlike the host's, is no complaint.
LIMITED='/invoked oom-killer/,/memory: usage|Mem-Info:/d'
# What a debug kernel says of each vmalloc() that fails, as a test has it do.
REFUSED='/vmalloc error: .*fail/,/Mem-Info:/d'

# complaints LOG [OPTION...]: those of a kernel, as grep finds them with these options.
complaints() {
	grep -avE "$BENIGN" "$1" | tr -d '\r' | sed "$REFUSED" | sed -E "$LIMITED" |
		grep -aE "${@:2}" -e "$SPLAT" || true
}

# cargo_for ARCH SUBCOMMAND [ARG...]: cargo for static binaries of ARCH.  One
# profile and one target directory for all, so that nothing is built twice.
cargo_for() {
	local arch=$1 target prefix name
	shift
	target=$(rust_target "$arch")
	export CARGO_TARGET_DIR=$CACHE/target RUSTFLAGS='-C target-feature=+crt-static'
	set -- "$1" --manifest-path "$TOP/Cargo.toml" --workspace --release --locked --target "$target" "${@:2}"
	if [[ $arch != "$(machine_arch)" ]]; then
		prefix=${target/-unknown/}
		name=${target//-/_}
		export "CC_$name=$prefix-gcc" "AR_$name=$prefix-ar" "CARGO_TARGET_${name^^}_LINKER=$prefix-gcc"
		# No compiled standard library of that target: build it too, from the
		# sources that deps found.
		if [[ ! -d $(rustc --print sysroot)/lib/rustlib/$target ]]; then
			export RUSTC_BOOTSTRAP=1 __CARGO_TESTS_ONLY_SRC_ROOT
			__CARGO_TESTS_ONLY_SRC_ROOT=$(rust_library)
			set -- "$1" -Zbuild-std "${@:2}"
		fi
	fi
	cargo "$@"
}

# What checks the library, as cargo install gets it: scripts/deps --tools.
# shellcheck disable=SC2034
CARGO_TOOLS=(cargo-deny@0.20.2 cargo-public-api@0.52.0)

# cargo_tool NAME@VERSION: the directory of its binary.
cargo_tool() {
	say "$CACHE/tools/$1/bin"
}

# msrv: the oldest Rust that the library is for, as rustup names it.
msrv() { sed -n 's/^rust-version = "\(.*\)"/\1.0/p' "$TOP/Cargo.toml"; }

# apt_extra NAME SUITES...: a private set of package lists under the cache, of
# SUITES on the mirror that the machine itself is configured for.  Prints the
# options that make apt use it; the machine's own lists stay as they are.
# APT_ARCH asks for packages of another architecture, APT_TYPE=deb-src for sources.
apt_extra() {
	local name=$1 dir uri key suite
	shift
	dir=$CACHE/apt/$name
	mkdir -p "$dir/lists/partial"
	{ apt_mirror || return 1; } >"$dir/mirror"
	uri=$(sed -n 1p "$dir/mirror")
	key=$(sed -n 2p "$dir/mirror")
	for suite in "$@"; do
		say "${APT_TYPE:-deb} ${key:+[signed-by=$key] }$uri $suite main"
	done >"$dir/sources.list"
	grep . <<-OPTIONS
		-oDir::Etc::sourcelist=$dir/sources.list
		-oDir::Etc::sourceparts=-
		-oDir::State::Lists=$dir/lists
		-oDir::Cache::pkgcache=
		-oDir::Cache::srcpkgcache=
		-oAPT::Sandbox::User=root
		${APT_ARCH:+-oAPT::Architecture=$APT_ARCH}
		${APT_ARCH:+-oAPT::Architectures=$APT_ARCH}
	OPTIONS
}

# apt_mirror: the URI and, on a second line, the keyring of the machine's main
# archive, from either format of sources.
apt_mirror() {
	local file all
	# The distribution's own first: others may name the suite too.
	all=$(for file in /etc/apt/sources.list.d/{debian,ubuntu}.sources /etc/apt/sources.list.d/*.sources; do
		[[ -f $file ]] || continue
		awk -v suite="$(os_release VERSION_CODENAME)" '
			function flush() {
				if (uri != "" && found) { print uri; print key; done = 1; exit }
				uri = key = ""; found = 0
			}
			/^[ \t]*$/ { flush() }
			/^URIs:/ { uri = $2 }
			/^Signed-By:/ { key = $2 }
			/^Suites:/ { for (i = 2; i <= NF; i++) if ($i == suite) found = 1 }
			END { if (!done) flush() }' "$file"
	done)
	[[ -n $all ]] || all=$(for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
		[[ -f $file ]] || continue
		awk -v suite="$(os_release VERSION_CODENAME)" '
			$1 == "deb" {
				key = ""
				if ($2 ~ /^\[/) {
					if (match($0, /signed-by=[^] ]*/)) key = substr($0, RSTART + 10, RLENGTH - 10)
					sub(/\[[^]]*\] */, "")
				}
				if ($3 == suite) { print $2; print key; exit }
			}' "$file"
	done)
	[[ -n $all ]] && sed -n 1,2p <<<"$all"
}

# apt_fetch DIR PACKAGE[=VERSION] [SUITE]: download a package into DIR without
# installing it, from the machine's own lists or from SUITE's.  Prints its file.
apt_fetch() {
	local dir=$1 package=$2 suite=${3:-} opts=() log=$LOGS/apt-fetch.log
	have apt-get || return 1
	if [[ -n $suite ]]; then
		mapfile -t opts < <(apt_extra "$suite${APT_ARCH:+-$APT_ARCH}" "$suite")
		((${#opts[@]})) || return 1
		apt-get "${opts[@]}" update >"$log" 2>&1 || return 1
	fi
	rm -rf "$dir/fetch"
	mkdir -p "$dir/fetch"
	(cd "$dir/fetch" && apt-get "${opts[@]}" download "$package" >>"$log" 2>&1) || return 1
	for package in "$dir/fetch/"*.deb; do
		mv "$package" "$dir/"
		say "$dir/${package##*/}"
	done
	rmdir "$dir/fetch"
}

os_release() { (. /etc/os-release 2>/dev/null && say "${!1:-}"); }

can_be_root() { ((EUID == 0)) || have sudo; }

as_root() {
	if ((EUID == 0)); then
		"$@"
	else
		sudo "$@"
	fi
}

is_static() { ! readelf -l "$1" 2>/dev/null | grep INTERP >/dev/null; }

# busybox_here ARCH: a static busybox of the architecture that is there already: the one
# that KVM_BPF_BUSYBOX names, one that was found before, or the machine's own.
busybox_here() {
	if [[ -n ${KVM_BPF_BUSYBOX:-} ]]; then
		say "$KVM_BPF_BUSYBOX"
	elif [[ -x $CACHE/busybox-$1 ]]; then
		say "$CACHE/busybox-$1"
	else
		[[ $1 == "$(machine_arch)" ]] && have busybox && is_static "$(command -v busybox)" &&
			command -v busybox
	fi
}

# find_busybox ARCH: the same, or the distribution's.
find_busybox() {
	local arch=$1 own=$CACHE/busybox-$1 package=busybox-static deb
	busybox_here "$arch" && return
	if [[ $arch == "$(machine_arch)" ]]; then
		deb=$(apt_fetch "$CACHE/debs" "$package") || deb=
	else
		deb=$(APT_ARCH=$arch apt_fetch "$CACHE/debs" "$package" "$(os_release VERSION_CODENAME)") || deb=
	fi
	if [[ -n $deb ]]; then
		dpkg-deb --fsys-tarfile "$deb" | tar -xO --wildcards './*bin/busybox' >"$own.new"
	else
		# Ubuntu's mirrors have other architectures' packages elsewhere, but all sources.
		build_busybox "$arch" "$own.new" ||
			die "no static busybox for $arch: name one with KVM_BPF_BUSYBOX"
	fi
	chmod +x "$own.new"
	mv "$own.new" "$own"
	say "$own"
}

# build_busybox ARCH FILE: from the sources that the distribution has.
build_busybox() {
	local arch=$1 to=$2 suite opts dir=$CACHE/debs/busybox log=$LOGS/busybox-$1.log prefix
	have apt-get || return 1
	warn "no package of a static busybox for $arch: building one"
	suite=$(os_release VERSION_CODENAME)
	mapfile -t opts < <(APT_TYPE=deb-src apt_extra "$suite-source" "$suite" "$suite-updates")
	((${#opts[@]})) || return 1
	prefix=$(rust_target "$arch")
	rm -rf "$dir"
	mkdir -p "$dir/src"
	{
		apt-get "${opts[@]}" update &&
			(cd "$dir" && apt-get "${opts[@]}" source --download-only busybox) &&
			tar -x -f "$dir"/busybox_*.orig.tar.* -C "$dir/src" --strip-components=1 &&
			make -C "$dir/src" defconfig &&
			# Its tc does not compile with the headers of Linux 6.8 and newer.
			sed -i -e 's/^CONFIG_TC=y/CONFIG_TC=n/' -e 's/.*CONFIG_STATIC[ =].*/CONFIG_STATIC=y/' "$dir/src/.config" &&
			make -C "$dir/src" -j"$JOBS" CROSS_COMPILE="${prefix/-unknown/}-" busybox
	} >"$log" 2>&1 </dev/null || {
		tail -n 5 "$log" >&2
		return 1
	}
	cp "$dir/src/busybox" "$to"
	rm -rf "$dir"
}
