// generate.h - prompts in, text out: what a user watches.
#pragma once
#include "model.h"
#include "options.h"

// Prints the text to stdout as it comes, notes and the closing line of figures to stderr.
//
// With o.prompt_lines every line of o.prompt is a prompt (a last line feed ends the last line, CR LF ends a line too, an
// empty line starts from BOS alone), and o.batch of them run at once; a sequence that ends makes room for the next prompt in
// the very next step.  Results come in the order of the prompts, each followed by a line "---", or with o.json as one JSON
// object a line.  What a prompt becomes depends on nothing but itself, its seed (o.sampler.seed + its line, from 0) and
// the ops' promise that a row's result does not depend on its neighbours (ops.h).
//
// Fails before anything is generated when a prompt does not fit the context: a prompt is never cut.
void generate(const Model &m, const Ops &ops, const Options &o);
