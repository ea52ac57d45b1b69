# make demo        install what is missing, build, tell a story with the bundled model
# make             ./run and build/{convert,show,random_model,make_codebook,plot}; with CUDA if nvcc is on the PATH, else CPU only
# make test        build and run every test         make test T='attention*'    only the doctest cases of that name
# make bench       speed against what this machine allows, in one table (of build/bench.jsonl): the bundled model, on a GPU large shapes
# make clean
# CUDA=0 CPU only      ARCH=sm_90 one GPU architecture      DEBUG=1 ASan and UBSan      INC=DIR more header folders
# MARCH=x86-64-v3 for other CPUs than this one (GCC's -march)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
NVCC  := $(shell which nvcc 2>/dev/null)
CUDA  ?= $(if $(NVCC),1,0)
ARCH  ?= $(if $(shell which nvidia-smi 2>/dev/null),native,sm_90)
DEBUG ?= 0
MARCH ?= native
INC   ?=
COMMA := ,
BUILD := build/cuda$(CUDA)-debug$(DEBUG)$(patsubst %,-%,$(filter-out native,$(MARCH)))#    objects of different configurations never mix

INCLUDES := -Isrc -Ikernels -Itokenizer -Itools $(INC:%=-I%)
CXXFLAGS := -std=c++17 -g -Wall -Wextra -fopenmp -march=$(MARCH) -DWITH_CUDA=$(CUDA) $(INCLUDES) -MMD -MP
ifeq ($(DEBUG),1)
  CXXFLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
else
  CXXFLAGS += -O3
endif

ifeq ($(CUDA),1)
  NVFLAGS := -std=c++17 -O3 -lineinfo -arch=$(ARCH) $(INCLUDES) -MMD -MP -Xcompiler -Wall,-Wextra
  LINK := $(NVCC) -arch=$(ARCH) $(if $(filter 1,$(DEBUG)),-Xcompiler -fsanitize=address$(COMMA)undefined) -Xcompiler -fopenmp
  LIBS := -lcublas
else
  LINK := $(CXX) $(CXXFLAGS)
endif

# A page of kernels/ holds a CPU half and a CUDA half: g++ compiles the first, nvcc the second.
LIB   := $(filter-out src/main.cpp,$(wildcard src/*.cpp)) $(wildcard kernels/*.cpp kernels/*.cu tokenizer/*.cpp)
TOOLS := convert show random_model make_codebook plot
TOOL_LIB := $(filter-out $(TOOLS:%=tools/%.cpp),$(wildcard tools/*.cpp))
TESTS := $(filter-out tests/%_main.cpp tests/bench_%.cpp,$(wildcard tests/*.cpp))
obj    = $(1:%=$(BUILD)/%.o) $(if $(filter 1,$(CUDA)),$(patsubst %,$(BUILD)/%.cuda.o,$(filter %.cu,$(1))))

all: run $(TOOLS:%=build/%)
run: $(BUILD)/run
	@cp $< $@
build/%: $(BUILD)/tool-%
	@cp $< $@

$(BUILD)/run: $(call obj,src/main.cpp $(LIB))
	$(LINK) $^ $(LIBS) -o $@
$(BUILD)/test: $(call obj,$(TESTS) $(TOOL_LIB) $(LIB))
	$(LINK) $^ $(LIBS) -o $@
$(BUILD)/tool-%: $(BUILD)/tools/%.cpp.o $(call obj,$(TOOL_LIB) $(LIB))
	$(LINK) $^ $(LIBS) -o $@
$(BUILD)/bench_attention: $(call obj,tests/bench_attention.cpp $(LIB))
	$(LINK) $^ $(LIBS) -o $@
$(BUILD)/bench_decode $(BUILD)/bench_products: $(BUILD)/bench_%: $(BUILD)/tests/bench_%.cu.cuda.o $(call obj,$(LIB))
	$(LINK) $^ $(LIBS) -o $@
$(BUILD)/%.cpp.o: %.cpp | headers
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -c $< -o $@
$(BUILD)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -x c++ -c $< -o $@
$(BUILD)/%.cu.cuda.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVFLAGS) -c $< -o $@
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
.PRECIOUS: $(BUILD)/%.cpp.o $(BUILD)/%.cu.o $(BUILD)/%.cu.cuda.o $(BUILD)/tool-%

ifeq ($(DEBUG),1)    # most of what the sanitized tests wait for, twice as fast
$(BUILD)/kernels/matmul.cu.o $(BUILD)/kernels/attention.cu.o: CXXFLAGS += -O2
endif

# The two header packages, from Debian or Ubuntu.
headers:
	@sh tools/need_headers.sh "$(CXX)" "$(INC:%=-I%)"

demo: all
	./run tests/models/books-5m.bin -p "Once upon a time, there was a little girl who" -n 110 --temp 0.6 --top-p 0.9 --min-p 0.05 -s 7
	@echo

test: all $(BUILD)/test
	@BUILD=$(BUILD) sh tests/run.sh "$(T)"

# One run each on a GPU, beside `--bench --json -d cuda`.
BENCHES := "--shape llama-3-8b -d 0,4096,32768,131072 --kv f16,nsn4b,nsn2b,nsn1" \
    "--shape llama-2-7b -d 0,32768 --kv f16,nsn2b" "--shape llama-3.2-1b -d 0,32768 --kv f16,nsn2b" \
    "--shape llama-3-8b --dtype q8 -d 0 --kv f16" "--shape llama-3-8b --dtype q4 -d 0 --kv f16" \
    "--shape llama-3-8b -d 4096 -b 32 --kv f16,nsn2b -n 256" "--shape llama-3-8b -d 8192 -b max --kv f16,nsn2b" \
    "--shape llama-2-7b -d 4096 -b max --kv f16,nsn2b,nsn1" "--shape llama-3-8b --dtype q4 -d 4096 -b 8 --kv nsn2b" \
    "--shape llama-3-8b --dtype q8 -d 4096 -b 32 --kv nsn2b" "--shape llama-3-8b --dtype q4 -d 4096 -b 32 --kv nsn2b"
ANCHORS ?= ../shared/bench/decode_attention_anchors.py
# What fails is counted, and the rest goes on.
bench: all $(BUILD)/bench_attention $(if $(filter 1,$(CUDA)),$(BUILD)/bench_decode $(BUILD)/bench_products)
	@rm -f build/bench.jsonl; failed=0; gpu=0; \
	measure() { echo "$$*" >&2; "$$@" >>build/bench.jsonl || failed=1; }; \
	if [ $(CUDA) = 1 ] && nvidia-smi >/dev/null 2>&1; then gpu=1; else echo "SKIPPED: no GPU, so no bench of it" >&2; fi; \
	measure ./run tests/models/books-5m.bin --bench --json -d 0,768; \
	if [ $$gpu = 1 ]; then \
	    for what in $(BENCHES); do measure ./run --bench --json -d cuda $$what; done; \
	    measure $(BUILD)/bench_products --json; \
	    measure $(BUILD)/bench_decode --json; \
	    if [ -f $(ANCHORS) ] && python3 -c "import torch" 2>/dev/null; then OUT=build python3 $(ANCHORS) || failed=1; \
	    else echo "SKIPPED: fp16 attention of PyTorch for comparison ($(ANCHORS) and torch)"; fi; \
	fi; \
	$(BUILD)/bench_attention || failed=1; echo; \
	build/plot table build/bench.jsonl && [ $$failed = 0 ]

clean:
	rm -rf build run
.PHONY: all headers demo test bench clean
