#include <cmath>

double plain();
double native();

int main() {
  double first = 0;
  for (int i = 0; i < 20; ++i) {
    const double a = plain(), b = native();
    if (i == 0) first = a;
    if (a != first || std::fabs(a - b) > 1e-5 * a) return 1;
  }
  return first > 0 ? 0 : 1;
}
