# --batch: a prompt a line, results in order; what a prompt becomes depends neither on its neighbours nor on N.
. tests/cli/lib.inc
long=$(i=0; while [ $i -lt 120 ]; do printf 'and the old man went home '; i=$((i + 1)); done)    # more tokens than a step has rows
cat >"$work/prompts" <<END
Once upon a time, there was a little
$long

The old man
"I am glad," said the
In the middle of the wood there stood
The sea
Once upon a time, there was a little
END
batch() { "$run" $model -f "$work/prompts" "$@" 2>"$work/err" || die "$*: $(cat "$work/err")"; }
get() { sed "s/.*\"$1\":\"*\([^,}\"]*\).*/\1/"; }

# the same bytes for every N, greedy and sampled, and those of single runs; a sealed block is in play (70 tokens and more)
for how in "-n 70 -c 1024 --kv nsn2b" "-n 9 -c 1024 --temp 0.9 --top-p 0.95 -s 5"; do
    : >"$work/want"
    i=0
    while IFS= read -r line; do
        seeded=$how
        case $how in *-s*) seeded="$how -s $((5 + i))" ;; esac
        "$run" $model -p "$line" $seeded 2>/dev/null >>"$work/want" || die "-p '$line'"
        printf '\n---\n' >>"$work/want"
        i=$((i + 1))
    done <"$work/prompts"
    hash=
    sizes="1 2 3 8"
    case ${BUILD:-} in *-debug1) sizes="1 3" ;; esac    # sanitizers are slow, and look at memory, not at N
    for n in $sizes; do
        batch $how --batch $n >"$work/out"
        same "$work/out" "$work/want"
        tail -n 1 "$work/err" | grep -qE "^\{.*\"prompts\":8,\"batch\":$n,\"stops\":\{.*\"tok_s\":" || die "closing line: $(tail -n 1 "$work/err")"
        h=$(tail -n 1 "$work/err" | get logits_hash)    # of the last logits of every prompt: more than the text shows
        [ "${hash:=$h}" = "$h" ] || die "--batch $n: other logits"
    done
done
# equal prompts have equal text when greedy, and not when each has a seed of its own
batch -n 20 --batch 3 --json >"$work/json"
[ "$(sed -n 1p "$work/json" | get logits_hash)" = "$(sed -n 8p "$work/json" | get logits_hash)" ] || die "the same prompt twice"
batch -n 20 --batch 3 --json --temp 1 >"$work/json"
[ "$(sed -n 1p "$work/json" | get logits_hash)" != "$(sed -n 8p "$work/json" | get logits_hash)" ] || die "one seed for two lines"

# exact prefill: a prompt is one step, whoever else is in it
batch -n 5 -c 1024 --kv nsn1 --prefill exact --json --batch 1 >"$work/want"
batch -n 5 -c 1024 --kv nsn1 --prefill exact --json --batch 3 >"$work/out"
same "$work/out" "$work/want"

# JSON: a line each, in order, the text alone
batch -n 5 --batch 3 --json >"$work/json"
[ "$(wc -l <"$work/json")" = 8 ] && [ "$(get line <"$work/json" | tr '\n' ' ')" = "1 2 3 4 5 6 7 8 " ] || die "--json: $(cat "$work/json")"
sed -n 1p "$work/json" | grep -qE '^\{"line":1,"prompt":"Once upon a time, there was a little","text":" girl, who was a","prompt_tokens":11,"tokens":5,"stop":"length","logits_hash":"[0-9a-f]{16}"\}$' || die "--json: $(sed -n 1p "$work/json")"
sed -n 5p "$work/json" | grep -q '"prompt":"\\"I am glad,\\" said the"' || die "--json: quotes"
"$run" $model -p "The old man" -n 5 --json 2>/dev/null | grep -q '^{"prompt":"The old man","text":' || die "--json of one prompt"

# stops: each sequence ends for its own reason; -n 0 prints the prompts
batch -c 730 --batch 8 -n 10 >/dev/null
grep -q "^1 of 8 stopped: the context of 730 tokens is full" "$work/err" || die "context: $(cat "$work/err")"
tail -n 1 "$work/err" | grep -q '"stops":{"context":1,"length":7}' || die "stops: $(tail -n 1 "$work/err")"
printf 'one\r\ntwo' | "$run" $model - --batch 2 -n 0 2>/dev/null >"$work/out"
printf 'one\n---\ntwo\n---\n' >"$work/want"
same "$work/out" "$work/want"

# what cannot be done is said before anything is made, with the line
refuses 1 "prompt, line 2: [0-9]+ tokens, the context holds 64" "$run" $model -f "$work/prompts" --batch 2 -c 64
: >"$work/empty"
refuses 1 "a prompt a line" "$run" $model -f "$work/empty" --batch 2
refuses 2 "from 1 to" "$run" $model -f "$work/prompts" --batch 0
refuses 2 "--batch N takes a prompt a line" "$run" $model -f "$work/prompts" -b 4
exit 0
