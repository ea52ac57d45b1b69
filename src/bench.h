// bench.h - how fast, and how far from what the machine allows.
#pragma once
#include "model.h"
#include "options.h"

// Measures read bandwidth, then prefill and decode at every depth of -d for -b sequences; prints a table with the bytes
// that must move, GB/s and their share of that bandwidth.
void bench(const Model &m, const Ops &ops, const Options &o);
