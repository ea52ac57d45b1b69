// device.h - where the model runs: the op table of a device by name, and the weights in its memory.
#pragma once
#include "model.h"

// "cpu" or "cuda".  Refuses, with the reason, what this program or machine cannot do: nothing else is used in its place.
const Ops *device_open(const std::string &name);

// The weights move to where the ops read them; on the CPU that is the mapped file itself.  One allocation, filled piece by
// piece from the mapping, so the host never holds a second copy.
void model_upload(Model &m, const Ops &ops);

// All weights, as one range of the device's memory.
struct WeightsRange { const void *data; int64_t bytes; };
WeightsRange model_weights(const Model &m);
