#!/bin/sh
# run.sh [FILTER] - every test: the doctest program, then the command line scripts of tests/cli.  Called by `make test`,
# with BUILD set.  The last line counts them all.
cd "$(dirname "$0")/.." || exit 1
filter=$1
out=$BUILD/test.out
passed=0 failed=0

"$BUILD/test" ${filter:+-tc="$filter"} >"$out" 2>&1
status=$?
grep -v '^$' "$out" | grep -vE '^\[doctest\] (doctest version|run with)|^=+$'
count() { sed -n "s/.*test cases: *[0-9]* *| *\([0-9]*\) passed *| *\([0-9]*\) failed.*/\\$1/p" "$out"; }
passed=$(count 1) failed=$(count 2)
: "${passed:=0}" "${failed:=0}"
if [ $status -ne 0 ] && [ "$failed" -eq 0 ]; then
    echo "the test program ended with code $status"
    failed=1
fi

if [ -z "$filter" ]; then
    for script in tests/cli/*.sh; do
        if sh "$script" >"$out" 2>&1; then
            passed=$((passed + 1))
            grep '^SKIPPED' "$out"
        else
            echo "FAILED: $script"
            cat "$out"
            failed=$((failed + 1))
        fi
    done
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
