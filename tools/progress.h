// progress.h - what a long conversion shows on a terminal, and how Ctrl-C ends it: by an exception, so that the
// half-written file is removed.
#pragma once
#include <chrono>
#include <csignal>
#include <string>
#include <unistd.h>
#include "base.h"

inline volatile std::sig_atomic_t interrupted = 0;

struct ProgressLine {
    using Clock = std::chrono::steady_clock;
    const bool terminal = isatty(2);
    Clock::time_point start = Clock::now(), drawn{};

    ProgressLine() {
        for (const int sig : {SIGINT, SIGTERM, SIGHUP}) std::signal(sig, [](int) { interrupted = 1; });
    }
    void operator()(const std::string &doing, uint64_t done, uint64_t total) {
        if (interrupted) {
            clear();
            fail("interrupted; nothing was written");
        }
        const Clock::time_point now = Clock::now();
        if (!terminal || now - drawn < std::chrono::milliseconds(100)) return;
        drawn = now;
        const double seconds = std::chrono::duration<double>(now - start).count();
        fprintf(stderr, "\r%3d%%  %.2f of %.2f GB  %.0f MB/s  %s\033[K", (int)(100 * done / total), done / 1e9,
                total / 1e9, done / 1e6 / seconds, doing.c_str());
    }
    void clear() const { if (terminal) fprintf(stderr, "\r\033[K"); }
};
