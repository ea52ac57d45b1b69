// files.h - whole text files.
#pragma once
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include "base.h"

// The bytes of a file, or of stdin for "-".
inline std::string read_file(const std::string &path) {
    FILE *f = path == "-" ? stdin : fopen(path.c_str(), "rb");
    if (!f) fail("%s: cannot open (%s)", path.c_str(), strerror(errno));
    std::string text;
    char piece[65536];
    size_t n;
    while ((n = fread(piece, 1, sizeof piece, f)) > 0) text.append(piece, n);
    const bool bad = ferror(f);
    const int why = errno;
    if (f != stdin) fclose(f);
    if (bad) fail("%s: cannot read (%s)", path.c_str(), strerror(why));
    return text;
}
