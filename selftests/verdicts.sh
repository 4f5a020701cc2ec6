# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=dash
#
# What the tests of the VMM share: verdicts and a result as Rust's test harness prints them,
# and what the log of a guest's VMM, $work/log, says.

VMM=${VMM:-/bin/kvm-bpf-vmm}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0
failed=0
: >"$work/log"

verdict() { # NAME STATUS
	if [ "$2" -eq 0 ]; then
		echo "test $1 ... ok"
		passed=$((passed + 1))
	else
		echo "test $1 ... FAILED"
		sed 's/^/    /' "$work/log"
		failed=$((failed + 1))
	fi
}

# result: of all verdicts, and the script's status.
result() {
	if [ $failed -eq 0 ]; then
		echo "test result: ok. $passed passed; 0 failed; 0 ignored"
	else
		echo "test result: FAILED. $passed passed; $failed failed; 0 ignored"
		exit 101
	fi
}

# all_said WORDS: the rest of the lines that begin with them
all_said() {
	tr -d '\r' <"$work/log" | sed -n "s/^$1 //p"
}

# between LOW VALUE HIGH: numbers, and none of them missing
between() {
	[ "$1" -le "$2" ] && [ "$2" -le "$3" ]
} 2>/dev/null
