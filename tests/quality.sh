#!/bin/sh
# quality.sh RUN MODEL TEXT OUT.jsonl [options of run] - what every cache format costs: one JSON line a format pair, in
# --ppl's own words, for `build/plot frontier` and for the table of the README, which quality_table.py prints from it.
run=$1 model=$2 text=$3 out=$4
shift 4
: >"$out"
while read -r k v rest; do
    [ -n "$k" ] || continue
    # shellcheck disable=SC2086
    "$run" "$model" --ppl "$text" -ctk "$k" -ctv "$v" $rest --against f16 --json "$@" </dev/null 2>/dev/null >>"$out" || echo "failed: $k $v $rest" >&2
done <<END
f16 f16
q8 q8
nsn4b nsn4b
q4 q4
nqkv nqkv
deco4 deco4
kivi2 kivi2
tq2 tq2
xquant xquant
nsn2 nsn2
nsn2b nsn2b
nsn1 nsn1
nsn4b nsn2b
nsn2 nsn2b
nsn2 nsn1
nsn2b nsn1
nsn1 nsn2b
nsn2b nsn2b --sink 64
nsn2b nsn2b --recent 64
nsn2b nsn2b --sink 64 --recent 64
nsn1 nsn1 --sink 64
nsn1 nsn1 --recent 64
nsn1 nsn1 --sink 64 --recent 64
nsn2 nsn2 --ablate first-norm
nsn2 nsn2 --ablate shift
nsn2 nsn2 --ablate hadamard
nsn2 nsn2 --ablate pre-rope
nsn2 nsn2 --ablate scale
nsn2b nsn2b --scale-exponent 0.8
nsn1 nsn1 --scale-exponent 0.8
nsn1 nsn1 --scale-exponent 0.6
nsn1 nsn1 --scale-exponent 1,0.5
nsn1 nsn1 --scale-exponent 0.5,1
nsn1 nsn1 --scale-exponent 0.8,0.4
END
