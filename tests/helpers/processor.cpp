// The kernel as a program, for a processor that is emulated: measures what comes on standard input.
#include "kernel.cpp"
#include <cstdio>
#include <cstdlib>

static char *read_bytes(int64_t n) {
  char *x = (char *)malloc(n);
  if (int64_t(fread(x, 1, n, stdin)) != n) exit(1);
  return x;
}

int main() {
  int64_t n[5]; // bytes of the plan, of p and of q; rows; numbers of the totals
  while (fread(n, sizeof n[0], 5, stdin) == 5) {
    char *plan = read_bytes(n[0]), *p = read_bytes(n[1]), *q = read_bytes(n[2]);
    double *kl = (double *)malloc(8 * n[3]), *totals = (double *)malloc(8 * n[4]);
    bool *agrees = (bool *)malloc(n[3]);
    klmetric_rows_baseline(*(const Job *)plan, p, q, nullptr, kl, agrees, nullptr, totals, 0, n[3]);
    fwrite(kl, 8, n[3], stdout), fwrite(agrees, 1, n[3], stdout), fwrite(totals, 8, n[4], stdout);
    Statistics *statistics = (Statistics *)malloc(sizeof(Statistics) * n[3]);
    Share *shares = (Share *)malloc(sizeof(Share) * n[3]);
    bool *in_order = (bool *)malloc(SIZES_OF_TOP * n[3]);
    klmetric_statistics_baseline(*(const Job *)plan, p, q, statistics, in_order, 1, 0, n[3]);
    klmetric_shares_baseline(*(const Job *)plan, p, q, shares, 0, n[3]);
    fwrite(statistics, sizeof *statistics, n[3], stdout), fwrite(in_order, SIZES_OF_TOP, n[3], stdout);
    fwrite(shares, sizeof *shares, n[3], stdout);
    free(plan), free(p), free(q), free(kl), free(agrees), free(totals), free(statistics), free(in_order), free(shares);
  }
}
