# --ppl: the protocol is on the line, and batch, stride, windows, a second cache and decoding do what they say.
. tests/cli/lib.inc
head -c 3000 tests/golden/README.md >"$work/text"
ppl() { "$run" $model --ppl "$work/text" --json "$@" 2>/dev/null; }
# get KEY [OBJECT]: a value of the JSON line, of an object or list inside it if one is named
get() {
    { if [ $# -gt 1 ]; then sed "s/.*\"$2\":\[*{//; s/}.*//"; else cat; fi; } | sed "s/.*\"$1\":\"*\([^,}\"]*\).*/\1/"
}
outer() { sed 's/"against":.*//; s/"positions":.*//'; }
less() { awk "BEGIN { exit !($1 < $2) }"; }
"$run" $model --ppl "$work/text" -c 256 --against f16 --by-position --windows 1 >"$work/out" 2>/dev/null || die "--against f16"
grep -qE "^Final estimate: PPL = [0-9.]+ \+/- [0-9.]+ \| nll .* context 256, stride 255, 255 tokens scored, BOS before each window, prefill coded, kv f16/f16, 16.0000 bits" "$work/out" || die "result line"
grep -q "^KL(f16/f16 || f16/f16) = 0.000000 +/- 0.000000" "$work/out" || die "KL of f16 against itself: $(cat "$work/out")"
grep -q "^same top-1 = 100.000 +/- 0.000 %" "$work/out" || die "same top-1 of f16 against itself"
grep -qE "^ +128-255 +127 " "$work/out" || die "--by-position: $(cat "$work/out")"

# other weights under the second cache: the same file does not differ from itself, under any cache
for kv in f16 nsn2; do
    ppl -c 256 --windows 1 --kv $kv --against-model $model >"$work/json" || die "--against-model"
    [ "$(get kl against <"$work/json")" = 0.0 ] && [ "$(get kv against <"$work/json")" = $kv/$kv ] || die "--against-model: $(cat "$work/json")"
done

one=$(ppl -c 256 -b 1 | get nll) three=$(ppl -c 256 -b 3 | get nll)
[ "$one" = "$three" ] || die "batches of 1 and 3 differ: $one $three"
half=$(ppl -c 256 --stride 128 | get nll)
less "$half" "$one" || die "stride: more context must help: $half $one"
[ "$(ppl -c 256 --windows 2 --no-bos | get scored)" = 510 ] || die "--no-bos scores all but the first token of each window"

# a coded cache: it diverges, decoding does not, and a step left out is another figure
ppl -c 256 --windows 1 --kv nsn2 --against f16 --by-position --decode >"$work/json" || die "--decode"
a=$(get kl against <"$work/json")
[ "$(outer <"$work/json" | get mode)" = decode ] && [ "$(get difference decode <"$work/json")" = 0.0 ] && less 0 "$a" && [ "$(get kl positions <"$work/json")" = 0.0 ] &&
    less "$(outer <"$work/json" | get bits)" 2.5 || die "nsn2: $(cat "$work/json")"
b=$(ppl -c 256 --windows 1 --kv nsn2 --against f16 --ablate shift,scale | get kl against)
[ "$a" != "$b" ] || die "--ablate changes nothing"

ppl -c 256 --needle --windows 2 --kv nsn2 --against f16 >"$work/json" || die "--needle"
[ "$(outer <"$work/json" | get trials)" = 2 ] && [ "$(get kv against <"$work/json")" = f16/f16 ] || die "--needle: $(cat "$work/json")"

refuses 2 "need --ppl" "$run" $model -p x --against f16
refuses 2 "need --ppl" "$run" $model -p x --against-model $model
refuses 2 "without --needle" "$run" $model --ppl "$work/text" --needle --against-model $model
refuses 1 "no/such.bin" "$run" $model --ppl "$work/text" --against-model no/such.bin
refuses 2 "only --prefill coded can agree" "$run" $model --ppl "$work/text" --decode --prefill exact
refuses 2 "needs a --stride below" "$run" $model --ppl "$work/text" --prefill exact
refuses 2 "'shft': expected words of first-norm" "$run" $model --ppl "$work/text" --kv nsn2 --ablate shift,shft
refuses 2 "no steps to leave out" "$run" $model --ppl "$work/text" --ablate shift
refuses 2 "no meaning" "$run" $model --ppl "$work/text" --needle --stride 5
refuses 2 "no sealed block" "$run" $model --ppl "$work/text" --needle -c 64 --json

# the plot: well-formed, one point and one label a format, no mixing of protocols
plot=${BUILD:-build}/tool-plot
[ -x "$plot" ] || plot=build/plot
for kv in nsn1 nsn2; do ppl -c 128 --windows 1 --kv $kv --against f16 >>"$work/rows"; done
"$plot" frontier "$work/rows" -o "$work/plot.svg" || die "plot frontier"
[ "$(grep -o '<circle' "$work/plot.svg" | wc -l)" = 2 ] && grep -q '>nsn1<' "$work/plot.svg" && grep -q '>nsn2<' "$work/plot.svg" || die "the plot"
ppl -c 100 --windows 1 --kv nsn1 --against f16 >>"$work/rows"
refuses 1 "rows:3: context: expected 128 as in .*rows:1, found 100" "$plot" frontier "$work/rows"
refuses 2 "expected frontier, depth or table" "$plot" pie
exit 0
