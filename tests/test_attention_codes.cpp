// test_attention_codes.cpp - the integer kernels of attention_codes.h: portable and AVX-512 give the same integers, whatever the
// codes, and neither overflows.
#include <doctest/doctest.h>
#include "attention_codes.h"
#include "cases.h"

static const std::vector<KvFormat> CODED = {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b};

TEST_CASE("NSN fields at run time are those of the types") {
    std::vector<uint8_t> block(64 * MAX_HEAD_DIM);
    for (KvFormat format : CODED)
        for (int d = 8; d <= MAX_HEAD_DIM; d += 8)
            with_format(format, d, [&](auto nsn) {
                if constexpr (decltype(nsn)::has_code && decltype(nsn)::has_plain) {
                    using Nsn = decltype(nsn);
                    const NsnFields a = nsn_fields(nsn, *(typename Nsn::Block *)block.data()), b = nsn_fields(format, d, block.data());
                    const bool same = a.d == b.d && a.channels == b.channels && a.code == b.code && a.sign == b.sign && a.s2_f16 == b.s2_f16 &&
                                      a.s2_log8 == b.s2_log8 && a.s1 == b.s1 && a.mean == b.mean && a.mean_step == b.mean_step && a.mean_min == b.mean_min;
                    INFO(std::string(kv_format_name(format)), " d ", d);
                    CHECK(same);
                }
            });
}

TEST_CASE("code kernels: the sums of the definition, portable and AVX-512") {
    std::mt19937_64 rng(5);
    int cases = 0;
    for (KvFormat format : CODED)
        for (int d : {32, 48, 64, 80, 96, 112, 128, 160, 224, 256})
            for (int M : {1, 2, 3, 4, 5, 7, 16})
                for (bool extreme : {false, true}) {
                    const int C = cpu::code_channels(format, d);
                    REQUIRE(C > 0);
                    const int8_t *codebook = kv_codebook(format);
                    std::vector<uint8_t> block(kv_block_bytes(format, d));
                    for (uint8_t &e : block) e = (uint8_t)rng();
                    const NsnFields f = nsn_fields(format, d, block.data());
                    if (extreme) {    // the entry with the largest sum of |x|, everywhere
                        int worst = 0, largest = -1;
                        for (int k = 0; k < 256; k++) {
                            int sum = 0;
                            for (int c = 0; c < C; c++) sum += std::abs(codebook[k * C + c]);
                            if (sum > largest) largest = sum, worst = k;
                        }
                        std::fill(f.code, f.code + 64 * d / C, (uint8_t)worst);
                    }
                    auto x = [&](int t, int c) {
                        const int v = codebook[f.code[t * (d / C) + c / C] * C + c % C];
                        return f.sign && is_negative(f.sign + t * (d / 8), d, c) ? ~v : v;
                    };
                    std::vector<float> q = random_floats((size_t)M * d, rng());
                    if (extreme)
                        for (int c = 0; c < M * d; c++) q[c] = x(0, c % d) < 0 ? -3.0f : 3.0f;
                    cpu::CodeScratch s;
                    cpu::code_queries(s, q.data(), M, d, C, d);
                    std::vector<uint8_t> w((size_t)M * 2 * KV_BLOCK);
                    for (uint8_t &e : w) e = extreme ? 255 : (uint8_t)rng();
                    std::vector<int> dots((size_t)M * KV_BLOCK), sums((size_t)M * d), got_dots(dots.size()), got_sums(sums.size());
                    for (int m = 0; m < M; m++) {
                        for (int t = 0; t < KV_BLOCK; t++) {
                            int64_t sum = 0;
                            for (int c = 0; c < d; c++) sum += (int64_t)s.queries.value[m * ((d + 31) / 32 * 32) + c] * x(t, c);
                            dots[m * KV_BLOCK + t] = (int)sum;
                            CHECK(dots[m * KV_BLOCK + t] == sum);    // it fits
                        }
                        for (int i = 0; i < d; i++) {
                            int64_t sum = 0;
                            for (int t = 0; t < KV_BLOCK; t++)
                                sum += (int64_t)(w[m * 2 * KV_BLOCK + t] * 256 + w[(m * 2 + 1) * KV_BLOCK + t]) * x(t, i);
                            sums[(size_t)m * d + i] = (int)sum;
                            CHECK(sums[(size_t)m * d + i] == sum);
                        }
                    }
                    INFO(std::string(kv_format_name(format)), " d ", d, " M ", M, " extreme ", extreme);
                    cpu::portable::code_dots(got_dots.data(), s, M, format, f);
                    cpu::portable::code_weighted(got_sums.data(), s, w.data(), M, format, f);
                    CHECK(got_dots == dots);
                    CHECK(got_sums == sums);
                    cases++;
                    if constexpr (cpu::HAVE_AVX512_CODES) {
                        if (d != 64 && d != 128 && d != 256) continue;
                        cpu::avx512::code_dots(got_dots.data(), s, M, format, f);
                        cpu::avx512::code_weighted(got_sums.data(), s, w.data(), M, format, f);
                        CHECK(got_dots == dots);
                        for (int i = 0; i < M * d; i++) CHECK(got_sums[i] == sums[i / d * d + cpu::code_channel(i % d, d, C)]);
                    }
                }
    if (!cpu::HAVE_AVX512_CODES) MESSAGE("SKIPPED: no AVX-512 VBMI and VNNI on this machine");
    MESSAGE(cases, " cases");
}

TEST_CASE("code queries: zeros, tiny numbers, and a NaN that stays in its row") {
    const int d = 64;
    std::vector<float> q(4 * d, 1.0f);
    for (int c = 0; c < d; c++) q[c] = 0.0f, q[d + c] = 1e-42f;
    q[3 * d + 5] = NAN;
    cpu::CodeScratch s;
    cpu::code_queries(s, q.data(), 4, d, 4, d);
    CHECK(s.queries.unit[0] == 0.0f);
    CHECK(s.queries.unit[1] == 0.0f);
    CHECK(s.queries.value[2 * d] == 32512);
    CHECK(std::isnan(s.queries.unit[3]));
}
