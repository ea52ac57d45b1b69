# The text: what goes to stdout, what stops it, and that the same command prints the same bytes.
. tests/cli/lib.inc
"$run" $model -p "Once upon a time, there was a little" -n 14 >"$work/a" 2>"$work/err" || die "does not run"
printf '%s' "Once upon a time, there was a little girl, who was a little girl, and was a little girl," >"$work/want"
same "$work/a" "$work/want"    # the greedy ids of transformers
tail -n 1 "$work/err" | grep -qE '^\{.*"tokens":14,"stop":"length".*"logits_hash":"[0-9a-f]{16}"\}$' || die "closing line: $(tail -n 1 "$work/err")"

for how in "-i" "-p"; do "$run" $model $how "Once upon a time, there was a little" -n 14 2>/dev/null >"$work/b"; same "$work/a" "$work/b"; done
printf 'Once upon a time, there was a little' >"$work/prompt"
"$run" $model -f "$work/prompt" -n 14 2>/dev/null >"$work/b"; same "$work/a" "$work/b"
"$run" $model - -n 14 <"$work/prompt" 2>/dev/null >"$work/b"; same "$work/a" "$work/b"
"$run" $model -p "Once upon a time, there was a little" -n 14 --no-echo 2>/dev/null >"$work/b"
printf '%s' " girl, who was a little girl, and was a little girl," >"$work/want"
same "$work/b" "$work/want"

# threads and seeds
"$run" $model -p "The old" -n 60 --temp 0.9 --top-p 0.95 -s 3 -t 1 2>/dev/null >"$work/a"
"$run" $model -p "The old" -n 60 --temp 0.9 --top-p 0.95 -s 3 -t 3 2>/dev/null >"$work/b"
same "$work/a" "$work/b"
"$run" $model -p "The old" -n 60 --temp 0.9 --top-p 0.95 -s 4 2>/dev/null >"$work/b"
cmp -s "$work/a" "$work/b" && die "seed 3 and seed 4 tell the same"

# the context's end is said
"$run" $model -p "The old" -c 40 >"$work/a" 2>"$work/err" || die "-c 40"
grep -q "the context of 40 tokens is full" "$work/err" || die "does not say that the context is full"
tail -n 1 "$work/err" | grep -q '"stop":"context"' || die "stop is not context"
refuses 1 "prompt: [0-9]+ tokens, the context holds 3" "$run" $model -p "The old man and the sea" -c 3
# too little memory is one line that says what would fit
refuses 1 "memory: .* MiB needed .*cache .*1 x 1000000000 tokens.*would fit: up to [0-9]+ tokens a sequence" "$run" $model -p "The old" -c 1000000000
# an empty prompt starts from BOS alone
"$run" $model -p "" -n 5 >"$work/a" 2>/dev/null && [ -s "$work/a" ] || die "empty prompt"
# a closed pipe or a full disk is no success
if [ -e /dev/full ]; then
    "$run" $model -p "The old" -n 20 >/dev/full 2>"$work/err" && die "/dev/full went unnoticed"
    grep -q "stdout: cannot write" "$work/err" || die "/dev/full: $(cat "$work/err")"
fi
exit 0
