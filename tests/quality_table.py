#!/usr/bin/env python3
"""quality_table.py RESULTS.jsonl... - the JSON lines of quality.sh as a Markdown table, one figure a text."""
import json
import sys

texts = [[json.loads(line) for line in open(path)] for path in sys.argv[1:]]
by = [{(j["kv"], j["sink"], j["recent"], j["ablate"], j.get("exponents", "")): j for j in t} for t in texts]
print("| K / V | bits | KiB a token | " + " | ".join("PPL | KL | top-1" for _ in texts) + " |")
print("| --- | --- | --- | " + " | ".join("--- | --- | ---" for _ in texts) + " |")
for key in by[0]:
    j = by[0][key]
    name = j["kv"] if j["kv"].split("/")[0] != j["kv"].split("/")[1] else j["kv"].split("/")[0]
    for word, value in (("sink", j["sink"]), ("recent", j["recent"]), ("without", j["ablate"]), ("exponent", j.get("exponents", ""))):
        if value:
            name += " %s %s" % (word, value)
    cells = []
    for t in by:
        r = t.get(key)
        cells.append("%.3f | %.5f ± %.5f | %.2f%%" % (r["ppl"], r["against"]["kl"], r["against"]["kl_error"], 100 * r["against"]["same_top"]) if r else "| |")
    print("| %s | %.3f | %.2f | %s |" % (name, j["bits"], j["kv_bytes_per_token"] / 1024, " | ".join(cells)))
