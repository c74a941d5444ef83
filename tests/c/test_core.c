#include "check.h"
TEST(arithmetic) { size_t x = 7; CHECK(!pc_mul_size(SIZE_MAX, 2, &x)); CHECK_INT(x, 7); }
int main(void) { RUN(arithmetic); return check_done(); }
