#include "coterie/attention/attention.hpp"

#include "attention/setup.hpp"
#include "catch.hpp"
#include "errors.hpp"

using namespace test;

namespace {

struct Call {
  Inputs<float> in{attention_cases()[1], 1};  // dense causal, 2 heads of 5
  Outputs<float> out{in};
  AttentionTape<float> tape;
  Context context;

  std::string forward() {
    const RowMatrix<float> before = out.out;
    std::string text = message_of<std::invalid_argument>(
        [&] { attention_forward(in.plan, in.q, in.k, in.v, out.out, tape, in.config, context, in.terms()); });
    if (!text.empty()) CHECK(out.out == before);
    return text;
  }
  std::string backward() {
    const Outputs<float> before = out;
    std::string text = message_of<std::invalid_argument>([&] {
      attention_backward(in.plan, in.q, in.k, in.v, out.out, tape, in.d_out, out.d_q, out.d_k, out.d_v, in.config,
                         context, in.terms(), out.terms(in));
    });
    if (!text.empty()) CHECK((out.d_q == before.d_q && out.d_k == before.d_k && out.d_v == before.d_v));
    return text;
  }
};

}  // namespace

TEST_CASE("attention_forward: wrong arguments are named, and nothing is written") {
  CHECK(Call().forward().empty());
  const auto says = [](const std::string& text, const char* argument) {
    INFO(text);
    CHECK(contains(text, std::string("attention_forward: ") + argument + ": expected "));
    CHECK(contains(text, ", got "));
  };
  Call call;
  const auto restore = [&] { call.in = Inputs<float>(attention_cases()[1], 1); };
  call.in.q.conservativeResize(36, 10), says(call.forward(), "q"), restore();
  call.in.q.conservativeResize(37, 9), says(call.forward(), "q"), restore();
  call.in.q.resize(37, 0), says(call.forward(), "q"), restore();
  call.in.k.conservativeResize(37, 8), says(call.forward(), "k"), restore();
  call.in.k.conservativeResize(38, 10), says(call.forward(), "k"), restore();
  call.in.v.conservativeResize(36, 10), says(call.forward(), "v"), restore();
  call.in.v.conservativeResize(37, 11), says(call.forward(), "v"), restore();
  call.in.config.heads = 0, says(call.forward(), "heads"), restore();
  call.in.config.kv_heads = 3, says(call.forward(), "kv_heads"), restore();
  call.in.config.scale = std::nan(""), says(call.forward(), "scale"), restore();
  for (const double cap : {-1.0, std::nan(""), 1e300})
    call.in.config.soft_cap = cap, says(call.forward(), "soft_cap"), restore();
  for (const double epsilon : {-1.0, std::nan(""), 0.01})  // the last one, for the plan has one entry for a row
    call.in.config.mean_epsilon = epsilon, says(call.forward(), "mean_epsilon"), restore();
  for (const double dropout : {-0.1, 1.0, std::nan("")})
    call.in.config.dropout = dropout, says(call.forward(), "dropout"), restore();
  const std::vector<double> scales(3, 1.0);
  call.in.config.scales = scales, says(call.forward(), "scales"), restore();
  const std::vector<double> not_finite = {1, std::nan("")};
  call.in.config.scales = not_finite, says(call.forward(), "scales"), restore();
  call.in.bias.resize(3, 4), says(call.forward(), "bias"), restore();
  call.in.memory_keys.resize(1, 10), says(call.forward(), "memory_keys"), restore();
  call.in.plan.row_begin.clear(), says(call.forward(), "plan"), restore();
  call.out.out.conservativeResize(37, 9), says(call.forward(), "out");
}

TEST_CASE("attention_forward: an output that overlaps an input is refused, a neighbouring column block is not") {
  Call call;
  RowMatrix<float> wide = RowMatrix<float>::Zero(37, 40);
  const auto forward = [&](auto q, auto out) {
    return message_of<ShapeError>(
        [&] { attention_forward(call.in.plan, q, call.in.k, call.in.v, out, call.in.config, call.context); });
  };
  CHECK(contains(forward(wide.middleCols(0, 10), wide.middleCols(5, 10)), "out: expected storage of its own"));
  CHECK(contains(forward(wide.middleCols(0, 10), wide.middleCols(0, 10)), "overlap with q"));
  CHECK(forward(wide.middleCols(0, 10), wide.middleCols(10, 10)).empty());
}

TEST_CASE("attention_forward: plans that do not belong together are refused") {
  Call call;
  std::vector<AttentionPlan> plans(3, call.in.plan);
  const auto forward = [&] {
    return message_of<ShapeError>(
        [&] { attention_forward(plans, call.in.q, call.in.k, call.in.v, call.out.out, call.in.config, call.context); });
  };
  CHECK(contains(forward(), "plans: expected 1 or 2 plans, got 3"));
  plans.resize(2);
  CHECK(forward().empty());
  plan_dense({.tokens = 37, .keys = 30}, plans[1]);
  CHECK(contains(forward(), "plans: expected plans of the same sizes"));
}

TEST_CASE("attention: an instruction set that the machine lacks is refused") {
  if (coterie::detail::machine_instruction_set() >= InstructionSet::avx512) return;
  Call call;
  Context context(InstructionSet::avx512);
  CHECK(contains(message_of<ValueError>([&] {
                   attention_forward(call.in.plan, call.in.q, call.in.k, call.in.v, call.out.out, call.in.config,
                                     context);
                 }),
                 "instructions: expected at most"));
}

TEST_CASE("attention_backward: wrong arguments are named, and nothing is written") {
  Call call;
  REQUIRE(call.forward().empty());
  const auto says = [](const std::string& text, const char* argument) {
    INFO(text);
    CHECK(contains(text, std::string("attention_backward: ") + argument + ": expected "));
  };
  const Outputs<float> good = call.out;
  const Inputs<float> in = call.in;
  const auto restore = [&] { call.out = good, call.in = in; };
  call.in.d_out.conservativeResize(36, 10), says(call.backward(), "d_out"), restore();
  call.out.out.conservativeResize(37, 8), says(call.backward(), "out"), restore();
  call.out.d_q.conservativeResize(37, 9), says(call.backward(), "d_q"), restore();
  call.out.d_k.conservativeResize(35, 10), says(call.backward(), "d_k"), restore();
  call.out.d_v.conservativeResize(37, 11), says(call.backward(), "d_v"), restore();
  call.out.d_scales.resize(1), says(call.backward(), "d_scales"), restore();
  call.in.config.scales = call.out.d_scales, says(call.backward(), "d_scales"), restore();
  call.in.d_lse.conservativeResize(37, 1), says(call.backward(), "d_lse"), restore();
  call.out.d_bias.resize(2, 3), says(call.backward(), "d_bias"), restore();
  call.tape = AttentionTape<float>(), says(call.backward(), "tape");
  REQUIRE(call.forward().empty());
  CHECK(call.backward().empty());
  CHECK(contains(message_of<ShapeError>([&] {
                   attention_backward(call.in.plan, call.in.q, call.in.k, call.in.v, call.out.out, call.tape,
                                      call.in.d_out, call.out.d_q, call.out.d_q, call.out.d_v, call.in.config,
                                      call.context);
                 }),
                 "d_k: expected storage of its own, got an overlap with d_q"));
}
