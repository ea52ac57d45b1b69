// generate.h - prompt in, text out: what a user watches.
#pragma once
#include "model.h"
#include "options.h"

// Prints the text to stdout as it comes, notes and the closing line of figures to stderr.  Fails when the prompt does
// not fit the context: a prompt is never cut.
void generate(const Model &m, const Ops &ops, const Options &o);
