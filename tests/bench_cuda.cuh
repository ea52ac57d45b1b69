// bench_cuda.cuh - how the benchmarks of single kernels take time on the GPU.
#pragma once
#include <algorithm>
#include <vector>
#include "cuda.cuh"

// Median of 9 replays of a graph of call(0) .. call(calls - 1), us a call.
template <class Call> double median_us(int calls, Call call) {
    call(0);    // loads the kernels
    CUDA_CHECK(cudaStreamSynchronize(cuda::stream));
    cudaGraph_t graph;
    cudaGraphExec_t run;
    CUDA_CHECK(cudaStreamBeginCapture(cuda::stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; i++) call(i);
    CUDA_CHECK(cudaStreamEndCapture(cuda::stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&run, graph, 0));
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    std::vector<double> us;
    for (int i = 0; i < 10; i++) {
        CUDA_CHECK(cudaEventRecord(start, cuda::stream));
        CUDA_CHECK(cudaGraphLaunch(run, cuda::stream));
        CUDA_CHECK(cudaEventRecord(stop, cuda::stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i > 0) us.push_back(ms * 1e3 / calls);
    }
    std::sort(us.begin(), us.end());
    cudaGraphExecDestroy(run), cudaGraphDestroy(graph), cudaEventDestroy(start), cudaEventDestroy(stop);
    return us[us.size() / 2];
}

// GB/s that reading memory takes here.
inline double measured_read_gb_s(const Ops &gpu) {
    const int64_t bytes = (int64_t)1 << 30;
    void *p = gpu.alloc(bytes);
    const double gb_s = gpu.read_gb_s(p, bytes, 5);
    gpu.release(p);
    return gb_s;
}
