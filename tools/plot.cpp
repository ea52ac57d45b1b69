// plot.cpp - SVG plots and a table of the figures that --ppl --json and --bench --json print.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include "command.h"
#include "json.h"

static const char *USAGE =
    "usage: plot frontier [FILE...] [-o OUT.svg]     what a format costs: bits a value against KL divergence\n"
    "       plot depth [FILE...] [-o OUT.svg]        tokens a second against tokens in the cache, dashed: what the machine allows\n"
    "       plot table [FILE...] [-o OUT.txt]        speeds as text, each beside what the read bandwidth allows\n"
    "\n"
    "  FILE holds one JSON object a line: of run --ppl TEXT --against f16 --json for frontier, of run --bench --json for\n"
    "  depth, of this, bench_decode --json and bench_products --json for table; without FILE stdin is read.  Without -o the\n"
    "  result goes to stdout.\n";

// ---- a plot: two axes, series of points -------------------------------------------------------------------
struct Point {
    double x, y, error = 0;    // error: half the length of a vertical bar
    std::string label = "";
};
struct Series {
    std::string name, color;
    std::vector<Point> points;
    bool dots = true, line = false, dashed = false;
};
struct Axis {
    std::string title;
    bool log = false;
    double min = 0, max = 0;                      // of the values; 0, 0: from the data
    double from = 0, to = 0;                      // in pixels
    double at(double v) const {
        const double share = log ? std::log(v / min) / std::log(max / min) : (v - min) / (max - min);
        return from + share * (to - from);
    }
};
struct Plot {
    std::string title, subtitle;
    Axis x, y;
    std::vector<Series> series;
};

constexpr int WIDTH = 860, HEIGHT = 560, LEFT = 84, RIGHT = 28, TOP = 78, BOTTOM = 62;
constexpr double LABEL_SIZE = 13, LETTER = 0.57 * LABEL_SIZE;    // the mean width of a letter in the fonts named below, rounded up
// Okabe and Ito's colours, which the colour-blind can tell apart.
static const char *const COLORS[] = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07D00", "#4B9CD3", "#555555"};
static std::string color_of(size_t i) { return COLORS[i % (sizeof COLORS / sizeof *COLORS)]; }

// Ticks at 1, 2 and 5 times powers of ten: all in the range on a logarithmic axis, about `wanted` on a linear one.
static std::vector<double> ticks_of(const Axis &a, int wanted) {
    std::vector<double> ticks;
    const double slack = 1e-9 * (a.max - a.min);
    if (a.log) {
        for (int e = (int)std::floor(std::log10(a.min)); std::pow(10, e) <= a.max; e++)
            for (const int digit : {1, 2, 5})
                if (digit * std::pow(10, e) >= a.min - slack && digit * std::pow(10, e) <= a.max + slack) ticks.push_back(digit * std::pow(10, e));
        return ticks;
    }
    const double rough = (a.max - a.min) / wanted, power = std::pow(10, std::floor(std::log10(rough)));
    const double step = power * (rough / power < 1.5 ? 1 : rough / power < 3.5 ? 2 : rough / power < 7.5 ? 5 : 10);
    for (double v = std::ceil(a.min / step - 1e-9) * step; v <= a.max + slack; v += step) ticks.push_back(std::fabs(v) < slack ? 0 : v);
    return ticks;
}

// The range of the data with some air, if the plot does not say.
static void fit_axis(Axis &a, const std::vector<double> &values) {
    if (a.min != a.max) return;
    a.min = *std::min_element(values.begin(), values.end()), a.max = *std::max_element(values.begin(), values.end());
    if (a.log) {
        a.min /= 1.6, a.max *= 1.6;
        return;
    }
    const double air = std::max(0.08 * (a.max - a.min), 1e-6 * std::fabs(a.max) + 1e-12);
    a.min = a.min >= 0 ? std::max(0.0, a.min - air) : a.min - air, a.max += air;
}

// ---- labels that overlap nothing --------------------------------------------------------------------------
struct Box { double x0, y0, x1, y1; };
static bool overlap(const Box &a, const Box &b) { return a.x0 < b.x1 && b.x0 < a.x1 && a.y0 < b.y1 && b.y0 < a.y1; }

// The free place nearest to (x, y), which is marked with a dot: around it in eight directions, then farther away.
static Box place_label(double x, double y, double width, const std::vector<Box> &taken) {
    const double h = LABEL_SIZE;
    for (double r = 9; r < 160; r += 5)
        for (const double angle : {0.0, 180.0, -35.0, 35.0, -145.0, 145.0, -90.0, 90.0, -65.0, 65.0, -115.0, 115.0}) {
            const double cx = x + r * std::cos(angle * M_PI / 180), cy = y + r * std::sin(angle * M_PI / 180);
            const double left = std::fabs(std::fabs(angle) - 90) < 1 ? cx - width / 2 : std::fabs(angle) < 90 ? cx : cx - width;
            const Box box = {left - 1, cy - h / 2 - 1, left + width + 1, cy + h / 2 + 1};
            if (box.x0 < LEFT + 2 || box.x1 > WIDTH - 4 || box.y0 < TOP + 2 || box.y1 > HEIGHT - BOTTOM - 2) continue;
            if (std::none_of(taken.begin(), taken.end(), [&](const Box &b) { return overlap(box, b); })) return box;
        }
    return {x + 9, y - h / 2, x + 9 + width, y + h / 2};    // no room anywhere
}

// ---- SVG --------------------------------------------------------------------------------------------------
static std::string escaped(const std::string &text) {
    std::string out;
    for (const char c : text) out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
    return out;
}
static std::string line_svg(double x0, double y0, double x1, double y1, const std::string &style) {
    return strf("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x0, y0, x1, y1, style.c_str());
}
static std::string text_svg(double x, double y, const std::string &text, const std::string &style) {
    return strf("<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style.c_str(), escaped(text).c_str());
}

static std::string axes_svg(const Plot &p) {
    std::string svg;
    for (const double v : ticks_of(p.x, 9)) {
        svg += line_svg(p.x.at(v), p.y.from, p.x.at(v), p.y.to, "stroke=\"#e8e8ee\"");
        svg += text_svg(p.x.at(v), p.y.from + 20, strf("%g", v), "text-anchor=\"middle\" class=\"tick\"");
    }
    for (const double v : ticks_of(p.y, 7)) {
        svg += line_svg(p.x.from, p.y.at(v), p.x.to, p.y.at(v), "stroke=\"#e8e8ee\"");
        svg += text_svg(p.x.from - 10, p.y.at(v) + 4, strf("%g", v), "text-anchor=\"end\" class=\"tick\"");
    }
    svg += line_svg(p.x.from, p.y.from, p.x.to, p.y.from, "stroke=\"#60606c\"");
    svg += line_svg(p.x.from, p.y.from, p.x.from, p.y.to, "stroke=\"#60606c\"");
    svg += text_svg((p.x.from + p.x.to) / 2, HEIGHT - 18, p.x.title, "text-anchor=\"middle\" class=\"axis\"");
    const double middle = (p.y.from + p.y.to) / 2;
    svg += text_svg(22, middle, p.y.title, strf("text-anchor=\"middle\" class=\"axis\" transform=\"rotate(-90 22 %.1f)\"", middle));
    return svg;
}

// Lines, error bars and dots; what labels must keep clear of goes to `taken`.
static std::string series_svg(const Plot &p, const Series &s, std::vector<Box> &taken) {
    std::string svg, path;
    double last_x = 0, last_y = 0;
    for (const Point &point : s.points) {
        const double x = p.x.at(point.x), y = p.y.at(point.y);
        if (s.line && !path.empty())    // small boxes along the line
            for (double t = 0; t < 1; t += 0.04) {
                const double bx = last_x + t * (x - last_x), by = last_y + t * (y - last_y);
                taken.push_back({bx - 2, by - 2, bx + 2, by + 2});
            }
        path += strf("%s%.1f,%.1f", path.empty() ? "" : " ", x, y);
        last_x = x, last_y = y;
        if (!s.dots) continue;
        const double low = p.y.at(std::max(p.y.min, point.y - point.error)), high = p.y.at(std::min(p.y.max, point.y + point.error));
        if (point.error > 0) {
            const std::string stroke = "stroke=\"" + s.color + "\" stroke-width=\"1.2\"";
            svg += line_svg(x, low, x, high, stroke) + line_svg(x - 4, low, x + 4, low, stroke) + line_svg(x - 4, high, x + 4, high, stroke);
            taken.push_back({x - 4, high, x + 4, low});
        }
        svg += strf("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\" fill=\"%s\" stroke=\"#fff\"/>\n", x, y, s.color.c_str());
        taken.push_back({x - 6, y - 6, x + 6, y + 6});
    }
    if (!s.line) return svg;
    return strf("<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\"%s/>\n", path.c_str(), s.color.c_str(), s.dashed ? " stroke-dasharray=\"5 4\"" : "") + svg;
}

static std::string labels_svg(const Plot &p, std::vector<Box> &taken) {
    std::string svg;
    for (const Series &s : p.series)
        for (const Point &point : s.points) {
            if (point.label.empty()) continue;
            const double x = p.x.at(point.x), y = p.y.at(point.y);
            const Box box = place_label(x, y, LETTER * point.label.size(), taken);
            taken.push_back(box);
            const double near_x = std::clamp(x, box.x0, box.x1), near_y = std::clamp(y, box.y0, box.y1);
            if (std::hypot(near_x - x, near_y - y) > 20) svg += line_svg(x, y, near_x, near_y, "stroke=\"#b0b0b8\" stroke-width=\"0.8\"");
            const bool left_of = box.x1 < x;
            svg += text_svg(left_of ? box.x1 - 1 : box.x0 + 1, box.y1 - 4, point.label,
                            strf("fill=\"%s\" class=\"label\"%s", s.color.c_str(), left_of ? " text-anchor=\"end\"" : ""));
        }
    return svg;
}

static std::string legend_svg(const Plot &p) {
    std::string svg;
    double x = LEFT;
    for (const Series &s : p.series) {
        if (s.name.empty()) continue;
        if (s.line) svg += line_svg(x, 61, x + 18, 61, "stroke=\"" + s.color + "\" stroke-width=\"1.6\"" + (s.dashed ? " stroke-dasharray=\"5 4\"" : ""));
        if (s.dots) svg += strf("<circle cx=\"%.1f\" cy=\"61\" r=\"4.5\" fill=\"%s\"/>\n", x + 9, s.color.c_str());
        svg += text_svg(x + 24, 65.5, s.name, "class=\"label\" fill=\"#33333c\"");
        x += 24 + LETTER * s.name.size() + 22;
    }
    return svg;
}

// Opaque and light: it reads the same on a light and on a dark page.
static std::string draw(Plot p) {
    p.x.from = LEFT, p.x.to = WIDTH - RIGHT, p.y.from = HEIGHT - BOTTOM, p.y.to = TOP;
    std::vector<double> xs, ys;
    for (const Series &s : p.series)
        for (const Point &point : s.points) {
            xs.push_back(point.x), ys.push_back(point.y + point.error);
            ys.push_back(p.y.log && point.y <= point.error ? point.y : point.y - point.error);
        }
    fit_axis(p.x, xs), fit_axis(p.y, ys);
    std::string svg = strf("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
                           "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n", WIDTH, HEIGHT, WIDTH, HEIGHT);
    svg += "<style>.tick{font-size:12px;fill:#60606c}.axis{font-size:14px;fill:#33333c}.label{font-size:13px}</style>\n";
    svg += strf("<rect width=\"%d\" height=\"%d\" rx=\"8\" fill=\"#fdfdfe\"/>\n", WIDTH, HEIGHT);
    svg += text_svg(LEFT, 28, p.title, "font-size=\"17\" font-weight=\"600\" fill=\"#1c1c22\"");
    svg += text_svg(LEFT, 47, p.subtitle, "font-size=\"12\" fill=\"#60606c\"");
    svg += legend_svg(p) + axes_svg(p);
    std::vector<Box> taken;
    for (const Series &s : p.series) svg += series_svg(p, s, taken);
    return svg + labels_svg(p, taken) + "</svg>\n";
}

// ---- the figures ------------------------------------------------------------------------------------------
struct Row { Json json; std::string where; };

static std::vector<Row> read_rows(const std::vector<std::string> &paths) {
    std::vector<Row> rows;
    for (const std::string &path : paths) {
        std::ifstream file;
        if (path != "-") file.open(path);
        if (path != "-" && !file) fail("%s: cannot open (%s)", path.c_str(), strerror(errno));
        std::string line;
        for (int n = 1; std::getline(path == "-" ? std::cin : file, line); n++) {
            if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
            const std::string where = strf("%s:%d", path.c_str(), n);
            rows.push_back({parse_strict_json(line.data(), line.size(), where), where});
            if (!rows.back().json.is_object()) fail("%s: expected a JSON object", where.c_str());
        }
    }
    if (rows.empty()) fail("%s: no figures", paths[0].c_str());
    return rows;
}

static double number(const Json &object, const char *key, const std::string &where) {
    const Json &value = get_field(object, key, where);
    if (!value.is_number()) fail("%s: %s: expected a number, found %s", where.c_str(), key, show_json(value).c_str());
    return value.get<double>();
}
static std::string base_name(const std::string &path) { return path.substr(path.find_last_of('/') + 1); }

// "nsn2" for "nsn2/nsn2".
static std::string short_pair(const std::string &pair) {
    const size_t slash = pair.find('/');
    return slash != std::string::npos && pair.substr(0, slash) == pair.substr(slash + 1) ? pair.substr(0, slash) : pair;
}

// Points are compared with each other: every line must have measured the same thing.
static void check_same_protocol(const std::vector<Row> &rows, const std::vector<const char *> &keys) {
    for (const Row &row : rows)
        for (const char *key : keys) {
            const Json &here = get_field(row.json, key, row.where), &first = get_field(rows[0].json, key, rows[0].where);
            if (here != first) fail("%s: %s: expected %s as in %s, found %s", row.where.c_str(), key, show_json(first).c_str(), rows[0].where.c_str(), show_json(here).c_str());
        }
}

static Plot plot_frontier(const std::vector<Row> &rows) {
    check_same_protocol(rows, {"model", "text", "context", "stride", "bos", "scored", "mode", "prefill"});
    const Json &first = rows[0].json;
    const std::string &w = rows[0].where, against = get_string(get_field(get_field(first, "against", w), "kv", w), "kv", w);
    Plot p;
    p.title = "What a KV cache format costs";
    p.subtitle = strf("%s on %s: context %g, stride %g, %g tokens scored, %s; bars: two standard errors",
                      base_name(get_string(get_field(first, "model", w), "model", w)).c_str(), base_name(get_string(get_field(first, "text", w), "text", w)).c_str(),
                      number(first, "context", w), number(first, "stride", w), number(first, "scored", w),
                      first.at("mode") == "decode" ? "token by token" : ("prefill " + get_string(get_field(first, "prefill", w), "prefill", w)).c_str());
    p.x.title = "bits a cached value: codes, scales, means, and the share of sinks and recents in fp16";
    p.y.title = "KL divergence from " + short_pair(against) + ", nats a token";
    p.y.log = true;

    std::map<std::string, Series> families;    // by the letters that the format's name begins with
    std::vector<Point> all;
    for (const Row &row : rows) {
        const Json &j = row.json, &a = get_field(j, "against", row.where);
        std::string pair = get_string(get_field(j, "kv", row.where), "kv", row.where), label = short_pair(pair);
        for (const char *window : {"sink", "recent"})
            if (number(j, window, row.where) > 0) label += strf(", %s %g", window, number(j, window, row.where));
        const std::string ablate = get_string(get_field(j, "ablate", row.where), "ablate", row.where);
        if (!ablate.empty()) label += " without " + ablate;
        const Point point = {number(j, "bits_with_exact", row.where), number(a, "kl", row.where), 2 * number(a, "kl_error", row.where), label};
        if (!(point.y > 0)) {
            fprintf(stderr, "%s: %s left out: a KL divergence of 0 has no place on a logarithmic axis\n", row.where.c_str(), label.c_str());
            continue;
        }
        if (pair.compare(0, 4, "f16/") == 0) pair = pair.substr(4);    // the side that is coded names the family
        const std::string family = pair.substr(0, std::find_if(pair.begin(), pair.end(), [](char c) { return !isalpha((unsigned char)c); }) - pair.begin());
        families[family].points.push_back(point);
        all.push_back(point);
    }
    if (all.empty()) fail("%s: no point with a KL divergence above 0", w.c_str());

    // The frontier: points that no other beats in both.
    Series frontier = {"", "#c4c4cc", {}, false, true, true};
    std::sort(all.begin(), all.end(), [](const Point &a, const Point &b) { return a.x != b.x ? a.x < b.x : a.y < b.y; });
    for (const Point &point : all)
        if (frontier.points.empty() || point.y < frontier.points.back().y) frontier.points.push_back({point.x, point.y});
    p.series.push_back(frontier);
    for (auto &[name, series] : families) {
        series.color = color_of(p.series.size() - 1);
        if (families.size() > 1) series.name = name;    // one family needs no legend
        p.series.push_back(series);
    }
    return p;
}

static Plot plot_depth(const std::vector<Row> &lines) {
    Plot p;
    p.title = "Decoding speed against depth";
    p.x.title = "tokens in the cache";
    p.y.title = "tokens a second";
    std::map<std::string, std::pair<Series, Series>> pairs;    // measured, and what the machine allows
    for (const Row &line : lines)
        for (const Json &row : get_field(line.json, "rows", line.where)) {
            const std::string name = short_pair(get_string(get_field(row, "kv", line.where), "kv", line.where)) + strf(", batch %g", number(row, "b", line.where));
            auto &[measured, limit] = pairs[name];
            const double depth = number(row, "depth", line.where);
            measured.points.push_back({depth, number(row, "decode_tok_s", line.where)});
            limit.points.push_back({depth, number(row, "limit_tok_s", line.where)});
        }
    if (pairs.empty()) fail("%s: no rows", lines[0].where.c_str());
    double deepest = 0;
    for (const auto &[name, pair] : pairs)
        for (const Point &point : pair.first.points) deepest = std::max(deepest, point.x);
    p.x.max = 1.22 * std::max(deepest, 1.0);    // room for the names at the ends of the lines
    p.subtitle = "dashed: the speed of light, memory bandwidth over the bytes that a step must read";
    for (auto &[name, pair] : pairs) {
        auto &[measured, limit] = pair;
        for (Series *s : {&measured, &limit}) {
            std::sort(s->points.begin(), s->points.end(), [](const Point &a, const Point &b) { return a.x < b.x; });
            s->line = true, s->color = color_of(p.series.size() / 2);
        }
        measured.points.back().label = name;
        limit.dots = false, limit.dashed = true;
        p.series.push_back(measured);
        p.series.push_back(limit);
    }
    p.y.log = true;
    return p;
}

// ---- the table --------------------------------------------------------------------------------------------
static std::string table(const std::vector<Row> &lines) {
    std::vector<std::vector<std::string>> cells = {
        {"what", "device", "kv", "unit", "batch", "depth", "measured", "allowed", "GB/s", "share", "prefill tok/s", "seal stall"}};
    constexpr size_t LEFT_COLUMNS = 4;                              // of text; numbers end where their column ends
    std::map<std::string, std::pair<double, double>> bandwidths;    // of a device, GB/s: least and most of all lines
    for (const auto &[j, w] : lines) {
        auto text = [&, &w = w](const Json &object, const char *key) { return printable(get_string(get_field(object, key, w), key, w)); };
        const bool model = j.contains("model");    // or one part of it alone
        const std::string device = text(j, "device");
        const double bandwidth = number(j, "read_gb_s", w);
        auto &[least, most] = bandwidths.insert({device, {bandwidth, bandwidth}}).first->second;
        least = std::min(least, bandwidth), most = std::max(most, bandwidth);
        for (const Json &row : get_field(j, "rows", w))
            cells.push_back({model ? printable(base_name(get_string(get_field(j, "model", w), "model", w))) + ", " + text(j, "weights")
                                   : text(j, "what") + ", " + text(row, "shape") + (row.contains("weights") ? ", " + text(row, "weights") : ""),
                             device,
                             row.contains("kv") ? short_pair(text(row, "kv")) : "",
                             model ? "tok/s" : "us",
                             strf("%.0f", number(row, "b", w)),
                             model || row.contains("tokens") ? strf("%.0f", number(row, model ? "depth" : "tokens", w)) : "",
                             strf("%.1f", number(row, model ? "decode_tok_s" : "us", w)),
                             strf("%.1f", number(row, model ? "limit_tok_s" : "limit_us", w)),
                             strf("%.1f", number(row, "gb_s", w)),
                             strf("%.0f%%", 100 * number(row, "share", w)),
                             model ? strf("%.0f", number(row, "prefill_tok_s", w)) : "",
                             row.contains("seal_stall") ? strf("%+.1f%%", 100 * number(row, "seal_stall", w)) : ""});
    }
    if (cells.size() == 1) fail("%s: no rows", lines[0].where.c_str());
    std::vector<size_t> widths(cells[0].size());
    for (const auto &row : cells)
        for (size_t i = 0; i < row.size(); i++) widths[i] = std::max(widths[i], row[i].size());
    std::string out;
    for (const auto &row : cells) {
        for (size_t i = 0; i < row.size(); i++) out += strf(i < LEFT_COLUMNS ? "%-*s  " : "%*s  ", (int)widths[i], row[i].c_str());
        out.erase(out.find_last_not_of(' ') + 1);
        out += '\n';
    }
    out += "\nallowed: if reading its bytes were all that a step does; share: of the read bandwidth measured in the same run,";
    for (const auto &[device, range] : bandwidths)
        out += (&device == &bandwidths.begin()->first ? " " : ", ") + device + (range.first < range.second ? strf(" %.1f to", range.first) : "") + strf(" %.1f GB/s", range.second);
    return out + "\n";
}

static void run(Arguments arguments) {
    std::string kind, word, output;
    if (!arguments.next(&kind)) refuse("expected plot frontier, plot depth or plot table (plot --help says more)");
    if (kind == "-h" || kind == "--help") { printf("%s", USAGE); return; }
    if (kind != "frontier" && kind != "depth" && kind != "table") refuse("'%s': expected frontier, depth or table", kind.c_str());
    std::vector<std::string> paths;
    while (arguments.next(&word)) {
        if (word == "-o") output = arguments.value();
        else if (word[0] == '-' && word != "-") refuse("unknown option '%s' (plot --help says more)", word.c_str());
        else paths.push_back(word);
    }
    if (paths.empty()) paths.push_back("-");
    const std::vector<Row> rows = read_rows(paths);
    const std::string result = kind == "table" ? table(rows) : draw(kind == "frontier" ? plot_frontier(rows) : plot_depth(rows));
    FILE *f = output.empty() ? stdout : fopen(output.c_str(), "wb");
    if (!f) fail("%s: cannot create (%s)", output.c_str(), strerror(errno));
    const bool written = fwrite(result.data(), 1, result.size(), f) == result.size();
    if ((f != stdout && fclose(f) != 0) || !written) fail("%s: cannot write", output.empty() ? "stdout" : output.c_str());
}

int main(int argc, char **argv) { return run_command("plot", argc, argv, run); }
