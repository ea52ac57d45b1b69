// command.h - what the command lines of the tools share: one line for an error, progress on a terminal, and Ctrl-C as
// an exception, so that a half-written file is removed on the way out.
#pragma once
#include <chrono>
#include <csignal>
#include <new>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include "base.h"

inline volatile std::sig_atomic_t interrupted = 0;

// Progress (checkpoint.h) as one line on stderr, redrawn ten times a second and gone at the end.
struct ProgressLine {
    using Clock = std::chrono::steady_clock;
    const bool terminal = isatty(2);
    Clock::time_point start = Clock::now(), drawn{};

    ProgressLine() {
        for (const int sig : {SIGINT, SIGTERM, SIGHUP}) std::signal(sig, [](int) { interrupted = 1; });
    }
    ~ProgressLine() { if (terminal) fprintf(stderr, "\r\033[K"); }

    void operator()(const std::string &doing, uint64_t done, uint64_t total) {
        if (interrupted) fail("interrupted; nothing was written");
        const Clock::time_point now = Clock::now();
        if (!terminal || now - drawn < std::chrono::milliseconds(100)) return;
        drawn = now;
        const double seconds = std::chrono::duration<double>(now - start).count();
        fprintf(stderr, "\r%3d%%  %.2f of %.2f GB  %.0f MB/s  %s\033[K", (int)(100 * done / total), done / 1e9,
                total / 1e9, done / 1e6 / seconds, doing.c_str());
    }
};

inline void report_written(const std::string &path, const std::string &note) {
    struct stat info = {};
    stat(path.c_str(), &info);
    if (!note.empty()) fprintf(stderr, "note: %s\n", note.c_str());
    fprintf(stderr, "wrote %s (%.1f MB)\n", path.c_str(), info.st_size / 1e6);
}

// The words of a command line, one after the other.
struct Arguments {
    int argc;
    char **argv;
    int i = 0;
    bool next(std::string *word) { return ++i < argc ? *word = argv[i], true : false; }
    std::string value() {    // of the option that next() gave
        if (i + 1 >= argc) refuse("%s: needs a value", argv[i]);
        return argv[++i];
    }
};

// main() of a tool: run(arguments), errors as one line with the tool's name.
template <class Run>
int run_command(const char *tool, int argc, char **argv, Run run) {
    try {
        run(Arguments{argc, argv});
        if (fflush(stdout) != 0 || ferror(stdout)) fail("cannot write to stdout");
        return 0;
    } catch (const Error &e) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", tool, e.what());
        return e.exit_code;
    } catch (const std::bad_alloc &) {
        fprintf(stderr, "%s: out of memory\n", tool);
        return 1;
    }
}
