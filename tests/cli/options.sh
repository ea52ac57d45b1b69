# Wrong options: one line that says what is wrong, exit code 2; wrong files: exit code 1.
. tests/cli/lib.inc
refuses 2 "no model given" "$run"
refuses 2 "nothing to do" "$run" $model
refuses 2 "needs a value" "$run" $model -p
refuses 2 "unknown option" "$run" $model -p x --frobnicate
refuses 2 "two prompts" "$run" $model -p x -i y
refuses 2 "only one of" "$run" $model -p x --bench
refuses 2 "'0.8': expected a whole number.*did you mean --temp" "$run" $model -p x -t 0.8
refuses 2 "expected a number" "$run" $model -p x --temp warm
refuses 2 "expected a number" "$run" $model -p x --temp nan
refuses 2 "expected a number from 0 to 1" "$run" $model -p x --top-p 1.5
refuses 2 "expected a number of at least|from 1 to" "$run" $model -p x -c 0
refuses 2 "expected a whole number" "$run" $model -p x -s -1
refuses 2 "expected cpu, cuda" "$run" $model -p x -d tpu
refuses 2 "-d cuda: " env CUDA_VISIBLE_DEVICES= "$run" $model -p x -d cuda
refuses 2 "KV format 'q3': unknown; there are.* f16" "$run" $model -p x --kv q3
refuses 2 "multiples of 64" "$run" $model -p x --sink 10
refuses 2 "expected coded or exact" "$run" $model -p x --prefill fast
refuses 2 "-ngl" "$run" $model -p x -ngl 99
refuses 2 "tokenizer is part of the model" "$run" $model -p x -z tok.bin
refuses 2 "a prompt needs -p" "$run" $model "Once upon a time"
refuses 1 "nowhere.bin: .*(No such file|cannot open)" "$run" nowhere.bin -p x
refuses 1 "nowhere.txt: cannot open" "$run" $model -f nowhere.txt
refuses 1 "nowhere.txt: cannot open" "$run" $model --ppl nowhere.txt
: >"$work/empty"
refuses 1 "empty" "$run" "$work/empty" -p x
refuses 1 "nothing to score" "$run" $model --ppl "$work/empty" --no-bos
head -c 5000000 $model >"$work/truncated.bin"
refuses 1 "truncated.bin: " "$run" "$work/truncated.bin" -p x
"$run" $model -p 0.9 -n 1 2>&1 >/dev/null | grep -q "did you mean --top-p 0.9" || die "no hint for -p 0.9"
"$run" --help | grep -q "usage: run MODEL.bin" || die "--help"
exit 0
