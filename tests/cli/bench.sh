# --bench: a row for every format, batch and depth, and figures that fit each other.
. tests/cli/lib.inc
"$run" $model --bench -d 100,0,700 --kv f16,nsn2b -b 1,3 -n 3 --prompt-tokens 64 --json >"$work/json" 2>"$work/err" || die "--bench: $(cat "$work/err")"
sed 's/.*"rows":\[//; s/},{/}\
{/g' "$work/json" >"$work/rows"
get() { sed "s/.*\"$1\":\"*\([^,}\"]*\).*/\1/"; }
list() { get "$1" <"$work/rows" | tr '\n' ' '; }
[ "$(list depth)" = "0 100 700 0 100 700 0 100 700 0 100 700 " ] || die "depths: $(list depth)"
[ "$(list b)" = "1 1 1 3 3 3 1 1 1 3 3 3 " ] || die "batches: $(list b)"
[ "$(list kv | tr ' ' '\n' | uniq -c | tr -s ' \n' ' ')" = " 6 f16/f16 6 nsn2b/nsn2b " ] || die "formats: $(list kv)"
# bytes: a token of f16 costs 3,072 bytes of this model; 3 sequences read 3 times the cache and the weights once
total() { sed -n "$1p" "$work/rows" | get bytes_per_step | sed 's/\..*//'; }
weights=$(sed -n 1p "$work/rows" | get weights_bytes_per_step | sed 's/\..*//')
[ "$(total 3)" = $((weights + 702 * 3072)) ] || die "f16, depth 700: $(total 3) bytes a step"    # 701, 702 and 703 tokens
[ "$(total 6)" = $((weights + 3 * 702 * 3072)) ] || die "f16, three sequences: $(total 6) bytes a step"
[ "$(total 9)" -lt $((weights + 702 * 3072 / 4)) ] || die "nsn2b reads $(total 9) bytes a step"
for key in prefill_tok_s decode_tok_s gb_s share limit_tok_s announced_bytes taken_bytes; do
    get $key <"$work/rows" | awk '!($1 > 0) { exit 1 }' || die "$key: $(list $key)"
done
"$run" $model --bench -d 70 -n 2 --prompt-tokens 8 -ctk nsn4b -ctv nsn2b >"$work/out" 2>/dev/null && grep -qE "^ +70 +1 nsn4b/nsn2b " "$work/out" || die "table: $(cat "$work/out")"

# a depth that does not fit is left out and said; the others are measured
"$run" $model --bench -d 0,200000000 -b 100 -n 1 --prompt-tokens 1 --json >"$work/json" 2>"$work/err" || die "-d 200000000: $(cat "$work/err")"
grep -q "^left out: depth 200000000: memory: " "$work/err" && grep -q '"rows":\[{"depth":0,.*"too_large":\[{"depth":200000000,' "$work/json" || die "too large: $(cat "$work/err" "$work/json")"
"$run" $model --bench -d 200000000 -b 100 >"$work/out" 2>"$work/err" && die "nothing fits, and exit code 0"
tail -n 1 "$work/err" | grep -q "no depth fits" || die "nothing fits: $(cat "$work/err")"

# steps that seal against those that do not: only where blocks are coded, and of three that seal or more
"$run" $model --bench -d 0 --kv f16,nsn2b -n 80 --prompt-tokens 8 --json >"$work/json" 2>"$work/err" || die "-n 80: $(cat "$work/err")"
[ "$(grep -o '"kv":"nsn2b/nsn2b".*"seal_stall":' "$work/json" | wc -l)" = 1 ] && [ "$(grep -o seal_stall "$work/json" | wc -l)" = 1 ] || die "seal_stall: $(cat "$work/json")"
get seal_stall <"$work/json" | awk '!($1 > -1) { exit 1 }' || die "seal_stall: $(cat "$work/json")"
"$run" $model --bench -d 64 --kv nsn2b -n 6 --prompt-tokens 8 --json >"$work/json2" 2>"$work/err" && ! grep -q seal_stall "$work/json2" || die "two steps that seal: $(cat "$work/json2" "$work/err")"

# the table: of these lines, of products and of attention alone
plot=${BUILD:-build}/tool-plot
[ -x "$plot" ] || plot=build/plot
cat >"$work/lines" <<'END'
{"model":"models/a.bin","weights":"q4","device":"cpu","read_gb_s":20,"rows":[{"depth":768,"b":3,"kv":"nsn2b/nsn2b","prefill_tok_s":5000.4,"decode_tok_s":812.34,"gb_s":14.04,"share":0.702,"limit_tok_s":1157.25,"seal_stall":0.041},{"depth":0,"b":1,"kv":"f16/nsn1","prefill_tok_s":1,"decode_tok_s":2,"gb_s":3,"share":0.04,"limit_tok_s":5}]}
{"what":"attention","device":"cuda","read_gb_s":3000,"rows":[{"shape":"32/8 heads of 128","b":32,"tokens":8192,"kv":"nsn2b","us":70.64,"us_open":72,"gb_s":2200,"share":0.733,"limit_us":51.8}]}
{"what":"products","device":"cuda","read_gb_s":3000,"rows":[{"shape":"Llama-3-8B, wo","b":1,"weights":"q4","us":5.01,"gb_s":1877.3,"share":0.61,"limit_us":3.08}]}
END
"$plot" table "$work/lines" -o "$work/table" || die "plot table"
tr -s ' ' <"$work/table" >"$work/cells"
for row in "a.bin, q4 cpu nsn2b tok/s 3 768 812.3 1157.2 14.0 70% 5000 +4.1%" "a.bin, q4 cpu f16/nsn1 tok/s 1 0 2.0 5.0 3.0 4% 1" \
    "attention, 32/8 heads of 128 cuda nsn2b us 32 8192 70.6 51.8 2200.0 73%" "products, Llama-3-8B, wo, q4 cuda us 1 5.0 3.1 1877.3 61%"; do
    grep -qxF "$row" "$work/cells" || die "the table has no row '$row': $(cat "$work/table")"
done
[ "$(sed -n 2,4p "$work/table" | awk '{ print index($0, "%") }' | uniq | wc -l)" = 1 ] && "$plot" table "$work/json" | grep -q "^books-5m.bin, bf16 .* nsn2b " || die "the table: $("$plot" table "$work/json")"
sed '2s/"us":70.64/"us":"fast"/' "$work/lines" >"$work/bad"
refuses 1 "bad:2: us: expected a number, found .fast" "$plot" table "$work/bad"
sed '1s/"weights":"q4",//' "$work/lines" >"$work/bad"
refuses 1 "bad:1: weights: missing" "$plot" table "$work/bad"
sed '2s/"what":"attention",//' "$work/lines" >"$work/bad"
refuses 1 "bad:2: what: missing" "$plot" table "$work/bad"
echo '{"device":"cuda"' >"$work/bad"
refuses 1 "bad:1: not valid JSON" "$plot" table "$work/bad"
echo '{"model":"a","device":"cpu","read_gb_s":1,"weights":"q4","rows":[]}' >"$work/bad"
refuses 1 "bad:1: no rows" "$plot" table "$work/bad"

refuses 2 "max: only for --bench" "$run" $model -p x -b max
refuses 2 "'most': expected a number from 1 to 65536" "$run" $model --bench -b most
refuses 2 "a list is for --bench" "$run" $model -p x --kv f16,nsn2b
refuses 2 "a list is for --bench" "$run" $model --ppl x -b 1,2
refuses 2 "names 2 formats for both" "$run" $model --bench --kv f16,nsn2b -ctk nsn1
refuses 2 "KV format ''" "$run" $model --bench --kv f16,
refuses 2 "only for --bench" "$run" --shape llama-3-8b -p x
refuses 2 "only for --bench" "$run" $model --bench --dtype f16
refuses 2 "takes no model" "$run" $model --bench --shape llama-3-8b
refuses 2 "expected one of llama-2-7b" "$run" --bench --shape llama-9
refuses 2 "expected f32, f16, bf16, q8 or q4" "$run" --bench --shape llama-3-8b --dtype q5
exit 0
