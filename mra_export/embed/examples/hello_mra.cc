// hello_mra BUNDLE: runs the bundle's golden inputs and prints how far the answers are from PyTorch's.
#include <cstdio>
#include <mra_session.hpp>

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: hello_mra BUNDLE\n"), 2;
  try {
    const mra::Session session(argv[1]);
    const std::vector<mra::GoldenRow> rows = session.CompareGolden();
    for (const mra::GoldenRow& row : rows) {
      std::printf("%s %s: max abs %.2e, needs %.2e, allowed %.0e: %s%s\n", row.name.c_str(), row.output.c_str(), row.max_abs,
                  row.needed, row.tolerance, row.status.c_str(), row.reason.empty() ? "" : (", " + row.reason).c_str());
    }
    session.Validate();
  } catch (const mra::Error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
