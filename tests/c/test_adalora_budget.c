/* AdaLora's importance, budget and orthogonality against the formulas written out. */
#include "check.h"

#include "../../src/methods/adalora_budget.h"

static pc_error err;

TEST(importance_follows_the_averages)
{
    const double p[3] = {2.0, -1.0, 0.5}, g[3] = {0.5, 3.0, 0.0};
    double mean[3] = {1.0, 0.0, 4.0}, spread[3] = {0.0, 1.0, 2.0};
    pc_importance_update(NULL, PC_F64, 3, p, g, 0.5, 0.75, mean, spread);
    const double want_mean[3] = {1.0, 1.5, 2.0}, want_spread[3] = {0.0, 0.75 + 0.25 * 1.5, 1.5 + 0.25 * 2.0};
    for (int i = 0; i < 3; i++) {
        CHECK_CLOSE(mean[i], want_mean[i], 1e-15);
        CHECK_CLOSE(spread[i], want_spread[i], 1e-15);
    }
    pc_importance_update(NULL, PC_F64, 3, p, NULL, 0.5, 0.75, mean, spread);
    CHECK_CLOSE(mean[1], 0.75, 1e-15);
    float fp[2] = {1.0f, 2.0f}, fg[2] = {1.0f, -2.0f}, fmean[2] = {0}, fspread[2] = {0};
    pc_importance_update(NULL, PC_F32, 2, fp, fg, 0.85, 0.85, fmean, fspread);
    CHECK_CLOSE(fmean[1], 4.0 * 0.15, 1e-6);
    CHECK_CLOSE(fspread[1], 0.15 * (4.0 - 0.6), 1e-6);
}

TEST(what_is_not_finite_is_found)
{
    float p[4] = {1, 2, 3, 4}, g[4] = {0, 0, 0, 0};
    CHECK(pc_importance_is_finite(NULL, PC_F32, 4, p, g));
    CHECK(pc_importance_is_finite(NULL, PC_F32, 4, p, NULL));
    g[3] = NAN;
    CHECK(!pc_importance_is_finite(NULL, PC_F32, 4, p, g));
    CHECK(pc_importance_is_finite(NULL, PC_F32, 3, p, g));
    double q[1] = {INFINITY};
    CHECK(!pc_importance_is_finite(NULL, PC_F64, 1, q, NULL));
}

TEST(scores_are_means_over_rows_and_columns)
{
    /* r = 2, in = 3, out = 2; uncertainty 1 everywhere, so that the score of an element is its sensitivity */
    const double ones[6] = {1, 1, 1, 1, 1, 1}, a[6] = {1, 2, 3, 4, 5, 6}, b[4] = {10, 20, 30, 40}, e[2] = {100, 200};
    double scores[2];
    pc_triplet_scores(PC_F64, 2, 3, 2, (pc_importance){a, ones}, (pc_importance){b, ones}, (pc_importance){e, ones},
                      scores);
    CHECK_CLOSE(scores[0], 100 + 2 + 20, 1e-12);
    CHECK_CLOSE(scores[1], 200 + 5 + 30, 1e-12);
}

TEST(thresholds)
{
    const double scores[5] = {3, 1, 2, NAN, 1};
    double threshold;
    CHECK_STATUS(pc_rank_threshold(5, scores, 2, &threshold, &err), PC_OK);
    CHECK_CLOSE(threshold, 2, 0);
    CHECK_STATUS(pc_rank_threshold(5, scores, 5, &threshold, &err), PC_OK);
    CHECK(threshold == -INFINITY);
    CHECK_STATUS(pc_rank_threshold(5, scores, 99, &threshold, &err), PC_OK);
    CHECK(threshold == -INFINITY);
    CHECK_STATUS(pc_rank_threshold(5, scores, 0, &threshold, &err), PC_OK);
    CHECK(isnan(threshold));
    CHECK_STATUS(pc_rank_threshold(0, scores, 0, &threshold, &err), PC_OK);
    pc_test_fail_allocation(1);
    CHECK_STATUS(pc_rank_threshold(5, scores, 2, &threshold, &err), PC_ERR_NOMEM);
    pc_test_fail_allocation(0);
}

TEST(the_budget_falls_with_the_third_power)
{
    const pc_rank_schedule schedule = {.tinit = 10, .tfinal = 20, .total_step = 110, .interval = 5, .initial = 120,
                                       .target = 40};
    bool allocate;
    CHECK_INT(pc_rank_budget(&schedule, 0, &allocate), 120);
    CHECK(!allocate);
    CHECK_INT(pc_rank_budget(&schedule, 10, &allocate), 120);
    CHECK(!allocate);
    CHECK_INT(pc_rank_budget(&schedule, 50, &allocate), 50); /* half way: 40 + 80 / 8 */
    CHECK(allocate);
    CHECK_INT(pc_rank_budget(&schedule, 51, &allocate), (int)(80 * pow(1.0 - 41.0 / 80.0, 3.0) + 40));
    CHECK(!allocate);
    CHECK_INT(pc_rank_budget(&schedule, 90, &allocate), 40);
    CHECK_INT(pc_rank_budget(&schedule, 91, &allocate), 40);
    CHECK(allocate);
}

static double norm_of(int64_t r, int64_t n, bool columns, const double *m)
{
    double sum = 0;
    for (int64_t i = 0; i < r; i++)
        for (int64_t j = 0; j < r; j++) {
            double dot = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k < n; k++)
                dot += columns ? m[k * r + i] * m[k * r + j] : m[i * n + k] * m[j * n + k];
            sum += dot * dot;
        }
    return sqrt(sum);
}

TEST(orthogonality_and_its_derivative)
{
    double m[6] = {0.3, -0.2, 0.9, 0.4, 0.1, -0.7}, norm;
    for (int columns = 0; columns < 2; columns++) {
        double grad[6] = {1, 1, 1, 1, 1, 1};
        CHECK_STATUS(pc_orthogonality(NULL, PC_F64, 2, 3, columns, m, 0.25, grad, &norm, &err), PC_OK);
        CHECK_CLOSE(norm, norm_of(2, 3, columns, m), 1e-12);
        for (int i = 0; i < 6; i++) {
            const double h = 1e-6, kept = m[i];
            m[i] = kept + h;
            double up = norm_of(2, 3, columns, m);
            m[i] = kept - h;
            double down = norm_of(2, 3, columns, m);
            m[i] = kept;
            CHECK_CLOSE(grad[i], 1 + 0.25 * (up - down) / (2 * h), 1e-8);
        }
    }
    const double unit[4] = {1, 0, 0, 1};
    double zero[4] = {0};
    CHECK_STATUS(pc_orthogonality(NULL, PC_F64, 2, 2, false, unit, 1.0, zero, &norm, &err), PC_OK);
    CHECK(norm == 0 && zero[0] == 0);
    CHECK_STATUS(pc_orthogonality(NULL, PC_F64, 0, 3, false, unit, 1.0, NULL, &norm, &err), PC_OK);
    pc_test_fail_allocation(1);
    CHECK_STATUS(pc_orthogonality(NULL, PC_F64, 2, 3, false, m, 1.0, NULL, &norm, &err), PC_ERR_NOMEM);
    pc_test_fail_allocation(0);
}

int main(void)
{
    RUN(importance_follows_the_averages);
    RUN(what_is_not_finite_is_found);
    RUN(scores_are_means_over_rows_and_columns);
    RUN(thresholds);
    RUN(the_budget_falls_with_the_third_power);
    RUN(orthogonality_and_its_derivative);
    return check_done();
}
