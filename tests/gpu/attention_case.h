// Inputs for the programs of this folder, and the dense formula of docs/operator.md in double precision to judge their results by.
#ifndef MRA_TESTS_GPU_ATTENTION_CASE_H_
#define MRA_TESTS_GPU_ATTENTION_CASE_H_

#include <stdint.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "mra_attention.h"

namespace mra_test {

enum class Masking { kNone, kHoles, kPadding, kDeadBlocks, kDeadRow };
constexpr const char* kMaskingNames[] = {"no padding", "holes", "padding", "dead blocks", "dead row"};
constexpr const char* kDtypeNames[] = {"float32", "float16", "bfloat16"};  // by MraDtype
// contract.py's TOLERANCES, "operator": |actual - expected| <= t + t * |expected|, the selection forced equal.
constexpr double kTolerance[] = {2e-5, 1e-3, 8e-3};

struct Case {
  int64_t batch, length;
  int heads, head_size;
  int64_t budget;
  bool full;
  int first, diagonal;
  bool padding_invariant;
  Masking masking;
  int period = 0;  // tokens repeat after so many, so that block scores tie; 0: they do not
};

inline size_t ElementSize(MraDtype dtype) { return dtype == MRA_FLOAT32 ? 4 : 2; }

// The bits of a value that the type holds exactly (test inputs are multiples of 1/64 below 4), or of a NaN.
inline uint32_t Encode(float value, MraDtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (dtype == MRA_FLOAT32) return bits;
  if (dtype == MRA_BFLOAT16) return bits >> 16;
  if (value != value) return 0x7e00;
  if (value == 0) return 0;
  return (bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff);
}

inline float Decode(uint32_t bits, MraDtype dtype) {
  if (dtype == MRA_FLOAT16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) {
      return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
    }
    return sign * (exponent ? std::ldexp(static_cast<float>(fraction + 1024), exponent - 25)
                            : std::ldexp(static_cast<float>(fraction), -24));
  }
  if (dtype == MRA_BFLOAT16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A tensor as numbers and as the bytes a kernel gets. values: (B, N, H * D).
struct Tensor {
  std::vector<float> values;
  std::vector<unsigned char> bytes;

  void Set(std::vector<float> numbers, MraDtype dtype) {
    values = std::move(numbers);
    const size_t size = ElementSize(dtype);
    bytes.resize(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = Encode(values[i], dtype);
      std::memcpy(&bytes[i * size], &bits, size);  // little-endian, as every machine with CUDA
    }
  }
};

inline std::vector<float> Values(const std::vector<unsigned char>& bytes, MraDtype dtype) {
  const size_t size = ElementSize(dtype);
  std::vector<float> values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[i * size], size);
    values[i] = Decode(bits, dtype);
  }
  return values;
}

struct Inputs {
  MraAttentionParams params;
  Tensor query, key, value;   // NaN at masked tokens
  std::vector<int32_t> mask;  // (B, N)

  int64_t blocks() const { return (params.length + 31) / 32; }
};

// A number from 0 to 2^32 - 1 for each argument, always the same.
inline uint32_t Hash(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(x >> 31);
}

inline Inputs MakeInputs(const Case& c, MraDtype dtype, uint64_t seed) {
  Inputs inputs;
  MraAttentionParams& p = inputs.params;
  p = {};
  p.struct_size = sizeof(p);
  p.dtype = dtype;
  p.batch = c.batch;
  p.length = c.length;
  p.num_heads = c.heads;
  p.head_size = c.head_size;
  p.num_blocks = c.budget;
  p.approx_mode = c.full ? MRA_APPROX_FULL : MRA_APPROX_SPARSE;
  p.initial_prior_first_n_blocks = c.first;
  p.initial_prior_diagonal_n_blocks = c.diagonal;
  p.padding_invariant = c.padding_invariant;
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.head_size));

  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t real = 1 + Hash(seed + 77 * static_cast<uint64_t>(b)) % c.length;
    for (int64_t n = 0; n < c.length; ++n) {
      const uint64_t token = seed * 131071 + static_cast<uint64_t>(b * c.length + n);
      const uint64_t block = seed * 8191 + static_cast<uint64_t>(b * c.length + n / 32);
      const bool hidden = c.masking == Masking::kHoles        ? Hash(token + 5) % 5 < 2
                          : c.masking == Masking::kPadding    ? n >= real
                          : c.masking == Masking::kDeadBlocks ? Hash(block + 6) % 5 < 2
                          : c.masking == Masking::kDeadRow    ? b == c.batch - 1
                                                              : false;
      inputs.mask.push_back(hidden ? 0 : 1);
    }
  }
  const int64_t hidden_size = int64_t{c.heads} * c.head_size;
  Tensor* const tensors[] = {&inputs.query, &inputs.key, &inputs.value};
  for (uint64_t which = 0; which < 3; ++which) {
    std::vector<float> numbers;
    for (int64_t row = 0; row < c.batch * c.length; ++row) {
      const int64_t n = c.period ? row % c.length % c.period : row;
      for (int64_t column = 0; column < hidden_size; ++column) {
        const uint64_t place = static_cast<uint64_t>(column) * 3 + which + (seed << 40);
        const int noise = static_cast<int>(Hash(static_cast<uint64_t>(n) * 4099 * 3 + place) % 127) - 63;
        const int drift = static_cast<int>(Hash(static_cast<uint64_t>(n / 32) * 65537 * 3 + place + 9) % 127) - 63;
        const float value = static_cast<float>(noise + (which == 2 ? 0 : drift)) / 64.0f;
        numbers.push_back(inputs.mask[static_cast<size_t>(row)] ? value : std::numeric_limits<float>::quiet_NaN());
      }
    }
    tensors[which]->Set(std::move(numbers), dtype);
  }
  return inputs;
}

// What the operator gives, (B, N, H * D), where blocks (B, H, nb, nb) holds 2 for a chosen pair, 1 for one excluded with it, else
// 0.
inline std::vector<double> Dense(const Inputs& in, const std::vector<uint8_t>& blocks) {
  const MraAttentionParams& p = in.params;
  const int64_t nb = in.blocks(), d = p.head_size, hidden = d * p.num_heads;
  std::vector<double> context(static_cast<size_t>(p.batch * p.length * hidden));
  std::vector<double> weight(static_cast<size_t>(p.length));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.num_heads; ++h) {
      const auto at = [&](int64_t n) { return static_cast<size_t>((b * p.length + n) * hidden + h * d); };
      const auto real = [&](int64_t n) { return in.mask[static_cast<size_t>(b * p.length + n)] != 0; };
      const auto pooled = [&](const Tensor& tensor) {
        std::vector<double> mean(static_cast<size_t>(nb * d));
        for (int64_t j = 0; j < nb; ++j) {
          double count = 0;
          for (int64_t n = j * 32; n < j * 32 + 32 && n < p.length; ++n) {
            if (!real(n)) continue;
            count += 1;
            for (int64_t x = 0; x < d; ++x) mean[static_cast<size_t>(j * d + x)] += tensor.values[at(n) + static_cast<size_t>(x)];
          }
          for (int64_t x = 0; x < d; ++x) mean[static_cast<size_t>(j * d + x)] /= count + 1e-6;
        }
        return mean;
      };
      const std::vector<double> query_mean = pooled(in.query), key_mean = pooled(in.key);
      const auto dot = [&](const auto& a, size_t a_at, const auto& c, size_t c_at) {
        double sum = 0;
        for (int64_t x = 0; x < d; ++x) sum += double{a[a_at + static_cast<size_t>(x)]} * double{c[c_at + static_cast<size_t>(x)]};
        return sum * p.scale;
      };
      for (int64_t n = 0; n < p.length; ++n) {
        if (!real(n)) continue;
        double largest = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < nb; ++j) {
          const uint8_t state = blocks[static_cast<size_t>(((b * p.num_heads + h) * nb + n / 32) * nb + j)];
          const double coarse = state == 0 && p.approx_mode == MRA_APPROX_FULL
                                    ? dot(query_mean, static_cast<size_t>(n / 32 * d), key_mean, static_cast<size_t>(j * d))
                                    : -std::numeric_limits<double>::infinity();
          for (int64_t m = j * 32; m < j * 32 + 32 && m < p.length; ++m) {
            double& w = weight[static_cast<size_t>(m)];
            w = !real(m)     ? -std::numeric_limits<double>::infinity()
                : state == 2 ? dot(in.query.values, at(n), in.key.values, at(m))
                             : coarse;
            largest = w > largest ? w : largest;
          }
        }
        if (std::isinf(largest)) continue;
        double sum = 0;
        for (int64_t m = 0; m < p.length; ++m) {
          const double w = std::exp(weight[static_cast<size_t>(m)] - largest);
          if (w == 0) continue;
          sum += w;
          for (int64_t x = 0; x < d; ++x) {
            context[at(n) + static_cast<size_t>(x)] += w * in.value.values[at(m) + static_cast<size_t>(x)];
          }
        }
        for (int64_t x = 0; x < d; ++x) context[at(n) + static_cast<size_t>(x)] /= sum + 1e-6;
      }
    }
  }
  return context;
}

// The largest error as a share of what is allowed; above 1, or NaN: wrong.
inline double Judge(const std::vector<float>& actual, const std::vector<double>& expected, MraDtype dtype) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double share = std::fabs(actual[i] - expected[i]) / (kTolerance[dtype] * (1 + std::fabs(expected[i])));
    if (!(share <= worst)) worst = share;
    if (worst != worst) return worst;
  }
  return worst;
}

inline std::string Name(const Case& c, MraDtype dtype) {
  char text[200];
  std::snprintf(text, sizeof(text), "B %lld H %d N %lld D %d K %lld %s F %d G %d%s, %s%s, %s", static_cast<long long>(c.batch),
                c.heads, static_cast<long long>(c.length), c.head_size, static_cast<long long>(c.budget),
                c.full ? "full" : "sparse", c.first, c.diagonal, c.padding_invariant ? " invariant" : "",
                kMaskingNames[static_cast<int>(c.masking)], c.period ? ", ties" : "", kDtypeNames[dtype]);
  return text;
}

}  // namespace mra_test

#endif  // MRA_TESTS_GPU_ATTENTION_CASE_H_
