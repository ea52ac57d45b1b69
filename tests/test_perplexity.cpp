// test_perplexity.cpp - the measuring mode: its arithmetic by hand, its windows by count, and that batches, a second cache
// and decoding change no figure.
#include <doctest/doctest.h>
#include <algorithm>
#include <cmath>
#include "cases.h"
#include "files.h"
#include "needle.h"
#include "perplexity.h"

TEST_CASE("score_row: loss and KL divergence by hand") {
    const float q[] = {0.0f, std::log(2.0f), 0.0f}, p[] = {5.0f, 5.0f, 5.0f};    // 1/4 1/2 1/4 and 1/3 1/3 1/3
    const Score s = score_row(q, p, 3, 1);
    CHECK(s.nll == doctest::Approx(std::log(2.0)).epsilon(1e-7));
    CHECK(s.against_nll == doctest::Approx(std::log(3.0)).epsilon(1e-12));
    CHECK(s.kl == doctest::Approx(std::log(32.0 / 27) / 3).epsilon(1e-6));    // 1/3 (ln 4/3 + ln 2/3 + ln 4/3)
    CHECK(!s.same_top);    // 1, and the lowest of three equals
    CHECK(score_row(p, q, 3, 0).kl == doctest::Approx(std::log(9.0 / 8) / 2).epsilon(1e-6));    // 1/4 ln 3/4 twice, 1/2 ln 3/2

    const float far[] = {1e4f, -1e4f, 3.0f};    // no overflow, and 0 ln 0 = 0
    CHECK(score_row(far, far, 3, 0).kl == 0);
    CHECK(score_row(far, far, 3, 1).nll == 2e4);
    CHECK(score_row(q, nullptr, 3, 1).nll == s.nll);
    for (const float bad : {NAN, INFINITY}) {
        const float row[] = {0.0f, bad, 1.0f};
        CHECK(!std::isfinite(score_row(row, nullptr, 3, 0).nll));
        CHECK(!std::isfinite(score_row(q, row, 3, 0).against_nll));
    }
}

TEST_CASE("equal rows: KL is exactly 0, whatever the logits") {
    const std::vector<float> row = random_floats(5000, 1, 8.0f);
    const Score s = score_row(row.data(), row.data(), 5000, 17);
    CHECK(s.kl == 0);
    CHECK(s.nll == s.against_nll);
    CHECK(s.same_top);
}

TEST_CASE("percentile: straight lines between the sorted values") {
    CHECK(percentile({7}, 0.99) == 7);
    CHECK(percentile({1, 2, 3, 4}, 0.5) == 2.5);
    CHECK(percentile({1, 2, 3}, 0.5) == 2);
    CHECK(percentile({1, 2, 3, 4}, 0) == 1);
    CHECK(percentile({1, 2, 3, 4}, 1) == 4);
    std::vector<float> x;
    for (int i = 0; i <= 200; i++) x.push_back((float)i);
    CHECK(percentile(x, 0.99) == 198);
    CHECK(percentile({10, 20}, 0.99) == doctest::Approx(19.9));
}

static std::vector<Score> scores_of(const std::vector<double> &nll, const std::vector<double> &against) {
    std::vector<Score> scores(nll.size());
    for (size_t i = 0; i < nll.size(); i++) scores[i].nll = nll[i], scores[i].against_nll = against[i];
    return scores;
}

TEST_CASE("summary: means, their errors, and the paired difference") {
    const Summary s = summarize(scores_of({1, 2, 3, 4}, {0, 0, 0, 0}), false);
    CHECK(s.nll.mean == 2.5);
    CHECK(s.nll.error == doctest::Approx(std::sqrt(5.0 / 12)));    // squares 2.25 + .25 + .25 + 2.25 over n (n - 1)
    CHECK(s.ppl.mean == doctest::Approx(std::exp(2.5)));
    CHECK(s.ppl.error == doctest::Approx(std::exp(2.5) * std::sqrt(5.0 / 12)));

    const double e = std::exp(1.0);
    const Summary d = summarize(scores_of({1, 3}, {1, 1}), true);
    CHECK(d.ln_ratio.mean == 1);
    CHECK(d.ln_ratio.error == 1);    // differences 0 and 2
    CHECK(d.delta_ppl.mean == doctest::Approx(e * e - e));
    CHECK(d.delta_ppl.error == doctest::Approx(e * e));    // e^2 nll - e against: e^2 - e and 3 e^2 - e
    // what a token costs both cancels: the ratio is sure although each PPL is not
    const Summary same = summarize(scores_of({1, 9, 4}, {0, 8, 3}), true);
    CHECK(same.ln_ratio.mean == 1);
    CHECK(same.ln_ratio.error == 0);
    CHECK(same.nll.error > 1);

    std::vector<Score> top(4);
    top[2].same_top = false;
    CHECK(summarize(top, true).same_top.mean == 0.75);
    CHECK(summarize(top, true).same_top.error == doctest::Approx(std::sqrt(0.75 * 0.25 / 4)));
    CHECK(summarize({Score{}}, true).nll.error == 0);    // one token has no spread
}

TEST_CASE("windows: every token in one, none scored twice") {
    auto same = [](const Window &w, int64_t begin, int64_t end, int64_t from) { return w.begin == begin && w.end == end && w.score_from == from; };
    std::vector<Window> w = cut_windows(10, 4, 4, 0);
    REQUIRE(w.size() == 3);
    CHECK(same(w[1], 4, 8, 4));
    CHECK(same(w[2], 8, 10, 8));
    w = cut_windows(10, 4, 2, 0);
    REQUIRE(w.size() == 4);
    CHECK(same(w[0], 0, 4, 0));
    CHECK(same(w[1], 2, 6, 4));
    CHECK(same(w[3], 6, 10, 8));
    CHECK(cut_windows(10, 4, 2, 2).size() == 2);
    for (int n = 1; n < 20; n++)
        for (int length = 1; length < 22; length++)
            for (int stride = 1; stride <= length; stride++) {
                int64_t scored = 0;
                for (const Window &v : cut_windows(n, length, stride, 0)) {
                    CHECK((v.score_from == scored && v.begin <= v.score_from && v.end > v.score_from && v.end - v.begin <= length));
                    scored = v.end;
                }
                CHECK(scored == n);
            }
}

TEST_CASE("positions: 0-63, then doubling") {
    std::vector<Score> scores;
    for (const int pos : {0, 63, 64, 127, 128, 255, 256, 1000}) {
        scores.emplace_back();
        scores.back().pos = pos;
    }
    const std::vector<Bucket> b = split_by_position(scores);
    REQUIRE(b.size() == 5);
    const int from[] = {0, 64, 128, 256, 512}, to[] = {63, 127, 255, 511, 1023}, count[] = {2, 2, 2, 1, 1};
    for (int i = 0; i < 5; i++) CHECK((b[i].from == from[i] && b[i].to == to[i] && (int)b[i].scores.size() == count[i]));
}

// ---- a model ----------------------------------------------------------------------------------------------
static const Model &books() {
    static const Model m = model_open("tests/models/books-5m.bin");
    return m;
}

static Options options_for(KvFormat kv, int context, int stride = 0) {
    Options o;
    o.ppl_file = "LICENSE", o.kv.k_format = o.kv.v_format = kv, o.context = context, o.stride = stride;
    return o;
}

static std::vector<Score> run(const Options &o, int slots) {
    const Protocol p = make_protocol(books(), o);
    Meter t;
    meter_open(t, books(), cpu_ops, caches_of(o), slots, p.longest, p.prompt, o.decode, true);
    return score_text(t, p, true);
}

static bool same_scores(const std::vector<Score> &a, const std::vector<Score> &b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const Score &x, const Score &y) {
        return x.nll == y.nll && x.against_nll == y.against_nll && x.kl == y.kl && x.same_top == y.same_top && x.pos == y.pos;
    });
}

TEST_CASE("scored tokens: BOS, strides, the last window") {
    const int n = (int)tokenizer_encode(books().tokenizer, read_file("LICENSE"), false).size();
    auto scored = [](Options o, bool bos = true) {
        o.ppl_bos = bos;
        return (int)run(o, 2).size();
    };
    CHECK(scored(options_for(KvFormat::f16, 100)) == n);        // BOS predicts the first token
    CHECK(scored(options_for(KvFormat::f16, 100, 60)) == n);
    CHECK(scored(options_for(KvFormat::f16, 100), false) == n - (n + 99) / 100);    // the first token of each window has nothing before it
    CHECK(scored(options_for(KvFormat::f16, 100, 60), false) == n - 1);
    CHECK(scored(options_for(KvFormat::f16, 1024)) == n);       // one window, shorter than the context
}

TEST_CASE("the same figures, bit for bit, however many sequences run at once") {
    Options o = options_for(KvFormat::nsn2, 140, 100);
    o.has_against = true;
    const std::vector<Score> one = run(o, 1);
    CHECK(same_scores(one, run(o, 3)));
    // beside another cache, on its own, and the same text again
    Options alone = options_for(KvFormat::nsn2, 140, 100), f16 = options_for(KvFormat::f16, 140, 100);
    const std::vector<Score> nsn2 = run(alone, 2), exact = run(f16, 2);
    REQUIRE((nsn2.size() == one.size() && exact.size() == one.size()));
    double coded = 0;
    for (size_t i = 0; i < one.size(); i++) {
        CHECK((one[i].nll == nsn2[i].nll && one[i].against_nll == exact[i].nll));
        if (one[i].pos < KV_BLOCK) CHECK((one[i].kl == 0 && one[i].same_top));    // no block is sealed
        else coded += one[i].kl;
    }
    CHECK(coded > 0);
}

TEST_CASE("f16 against f16: no divergence at all") {
    Options o = options_for(KvFormat::f16, 150);
    o.has_against = true;
    const Summary s = summarize(run(o, 2), true);
    CHECK((s.kl.mean == 0 && s.kl_p99 == 0 && s.ln_ratio.mean == 0 && s.delta_ppl.error == 0 && s.same_top.mean == 1));
}

TEST_CASE("every format keeps what the model says: keys or values that are lost cost a nat, the coarsest format a tenth") {
    for (int f = 0; f < (int)KvFormat::count; f++) {
        const double bits = kv_bits((KvFormat)f, books().config.head_dim);
        for (const bool key : {false, true}) {
            Options o = options_for(KvFormat::f16, 200);
            (key ? o.kv.k_format : o.kv.v_format) = (KvFormat)f;
            o.has_against = true, o.max_windows = 1;
            INFO(kv_format_name((KvFormat)f), key ? " keys" : " values");
            CHECK(summarize(run(o, 1), true).kl.mean < (bits > 8 ? 1e-3 : (KvFormat)f == KvFormat::xquant ? 0.3 : 0.2));    // xquant: two layers share one bit
        }
    }
}

TEST_CASE("decoding token by token gives what coded prefill gives, in every format") {
#ifdef __SANITIZE_ADDRESS__
    constexpr int EVERY = 4;    // the sanitizer makes every one of them slow
#else
    constexpr int EVERY = 1;
#endif
    for (int f = 0; f < (int)KvFormat::count; f += EVERY) {
        Options o = options_for((KvFormat)f, 150);
        o.max_windows = 1;
        const std::vector<Score> prefill = run(o, 1);
        o.decode = true;
        INFO(kv_format_name((KvFormat)f));
        CHECK(same_scores(run(o, 1), prefill));
    }
}

TEST_CASE("exact prefill: the head of a window is a prompt whose rows see each other exactly") {
    Options o = options_for(KvFormat::nsn1, 200, 50);
    o.kv.exact_prefill = true;
    const std::vector<Score> exact = run(o, 2);
    CHECK(same_scores(exact, run(o, 1)));

    // the second window by hand: 150 tokens in one step, then one at a time
    const Protocol p = make_protocol(books(), o);
    const Window &w = p.windows[1];
    std::vector<int> ids = {p.bos};
    ids.insert(ids.end(), p.ids.begin() + w.begin, p.ids.begin() + w.end);
    const int head = (int)(w.score_from - w.begin) + 1, V = books().config.vocab;
    KvCache cache;
    kv_cache_open(cache, cpu_ops, books().config, o.kv, 1, 200);
    Activations a;
    activations_open(a, cpu_ops, books().config, head, 1);
    Rows rows;
    for (int done = 0; done + 1 < (int)ids.size();) {
        rows.clear();
        const int end = done ? done + 1 : head;
        for (; done < end; done++) rows.add(ids[done], 0, done, done == end - 1);
        kv_cache_reserve(cache, 0, end);
        forward(books(), cache.view, a, rows.batch(), cpu_ops);
        CHECK(exact[w.score_from + end - head].nll == score_row(a.logits, nullptr, V, ids[end]).nll);
    }

    o.kv.exact_prefill = false;
    const std::vector<Score> coded = run(o, 2);
    CHECK(coded[w.score_from].nll != exact[w.score_from].nll);
    for (size_t i = 0; i < (size_t)w.score_from; i++) CHECK(coded[i].nll == exact[i].nll);    // the first window has no prompt
    o.kv.exact_prefill = true, o.stride = 0;
    CHECK_THROWS_AS(make_protocol(books(), o), Error);
}

TEST_CASE("needles: inside sealed blocks, asked for at the end, the same for the same seed") {
    const Tokenizer &tokenizer = books().tokenizer;
    std::vector<int> text;
    for (int id = 300; id < 900; id++) text.push_back(id);
    for (const int sink : {0, 1})
        for (const int recent : {0, 2}) {
            KvView kv{};
            kv.L = 12, kv.sink = sink, kv.recent = recent;
            const std::vector<NeedleTrial> trials = make_trials(books(), text, 1, kv, 410, 40, 5);    // layers differ in where codes end
            for (const NeedleTrial &t : trials) {
                REQUIRE((t.ids.size() == 410 && t.without.size() == 410));
                const int needle = t.end - t.begin, asked = 410 - (needle - 1);    // the question and the key again, without the stop
                CHECK((t.begin >= std::max(1, sink * KV_BLOCK) && t.end <= kv.coded_end(asked, 11) * KV_BLOCK));
                CHECK(std::equal(t.ids.begin() + t.begin, t.ids.begin() + t.end - 1, t.ids.begin() + asked));
                CHECK(std::equal(t.ids.begin() + asked, t.ids.end(), t.without.begin() + asked));
                CHECK(std::equal(t.ids.begin(), t.ids.begin() + t.begin, t.without.begin()));
                CHECK(std::equal(t.ids.begin() + t.end, t.ids.begin() + asked, t.without.begin() + t.begin));
                for (int w = 0; w < NEEDLE_WORDS; w++) CHECK(std::count(t.others[w], t.others[w] + NEEDLE_OTHERS, t.ids[410 - NEEDLE_WORDS + w]) == 0);
            }
            const std::vector<NeedleTrial> again = make_trials(books(), text, 1, kv, 410, 40, 5), other = make_trials(books(), text, 1, kv, 410, 40, 6);
            CHECK((again[39].ids == trials[39].ids && other[39].ids != trials[39].ids));
        }
    for (const int id : needle_words(tokenizer)) CHECK(tokenizer_encode(tokenizer, tokenizer.pieces[id].substr(1), false) == std::vector<int>{id});
    KvView short_of_blocks{};
    short_of_blocks.L = 12;
    CHECK_THROWS_AS(make_trials(books(), text, 1, short_of_blocks, 70, 1, 0), Error);
}
