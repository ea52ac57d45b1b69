# --ppl: the protocol is on the line, and batch, stride and windows do what they say.
. tests/cli/lib.inc
head -c 6000 README.md >"$work/text"
ppl() { "$run" $model --ppl "$work/text" --json "$@" 2>/dev/null; }
get() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
"$run" $model --ppl "$work/text" -c 256 2>/dev/null | grep -qE "^Final estimate: PPL = [0-9.]+ \+/- [0-9.]+ \| nll .* context 256, stride 255, [0-9]+ tokens scored, BOS before each window, prefill coded, kv f16/f16, 16.0000 bits" || die "result line"
one=$(ppl -c 256 -b 1 | get nll) four=$(ppl -c 256 -b 4 | get nll) odd=$(ppl -c 256 -b 3 | get nll)
[ "$one" = "$four" ] && [ "$one" = "$odd" ] || die "batches of 1, 4 and 3 differ: $one $four $odd"
half=$(ppl -c 256 --stride 128 | get nll)
python3 -c "assert $half < $one, 'more context must help: $half $one'" || die "stride"
[ "$(ppl -c 256 --windows 2 | get scored)" = 510 ] || die "--windows 2"
[ "$(ppl -c 256 --windows 2 --no-bos | get scored)" = 510 ] || die "--no-bos scores all but the first token of each window"
exit 0
