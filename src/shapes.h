// shapes.h - sizes of known models by name: for random weights, where only sizes matter.
#pragma once
#include "model.h"

constexpr const char *SHAPE_NAMES = "llama-2-7b, llama-3-8b, llama-3.2-1b";

// False when no shape has that name.  The Config has no bos and no eos.
bool shape_from_name(const std::string &name, Config *c);
