"""Bugs of one line that attack code is known for, each with a few quick tests that must see it.

test_attack_bugs.py plants them, each in its own copy of src, and runs this file, which runs their
tests: every pytest is a fork of one process that has imported torch, which takes most of the time.
"""

import json
import os
import sys
from dataclasses import dataclass

ATTACKS, CORE, BALLS = "attacks.py", "utils/attack/core.py", "utils/attack/balls.py"
APGD, SQUARE = "utils/attack/apgd.py", "utils/attack/square.py"
DEFENSES, CELLS, AUDIT = "utils/defenses.py", "utils/measure.py", "utils/audit.py"
GCM = "gcm.py"
FREE, SHEET, PASSES = "free_at.py", "fgsm_mnist.py", "utils/passes.py"
DATA, LOOP, FINISHED = "utils/data.py", "utils/loop.py", "utils/finished.py"
STAGES, EVALUATED, HEADS = "train_gcm.py", "eval_net.py", "utils/nets.py"


@dataclass(frozen=True)
class Bug:
    """In `file`, `old`, which stands there once, becomes `new`; `tests` (node ids) must fail."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple


def stage(name):
    return f"tests/test_challenge.py::test_{name}"


def form(name):
    return f"tests/test_attacks.py::test_{name}"


def rule(name):
    return f"tests/test_attacks_contract.py::test_{name}"


def layer(name):
    return f"tests/test_defenses.py::test_{name}"


def count(name):
    return f"tests/test_measure.py::test_{name}"


def free(name):
    return f"tests/test_free.py::test_{name}"


def network(name):
    return f"tests/test_eval_net.py::test_{name}"


def sheet(name):
    return f"tests/test_exercise.py::test_{name}"


OPTIMUM = "on_a_linear_model_the_optimum_is_reached_and_not_passed"
BALL = "the_result_is_in_the_ball_and_in_the_box_and_worse_than_the_clean_image"
AS_BEFORE = "model_images_labels_and_global_random_numbers_are_as_before"
EVAL = "it_attacks_the_model_in_eval_mode_whatever_its_mode_also_under_no_grad"
UNDEFENDED = "an_adaptive_attack_on_gcm_gives_the_images_of_the_undefended_network"
NEAREST = "the_projection_is_the_nearest_allowed_point_by_bisection_and_by_comparison"

BUGS = [
    Bug("a step down the loss", ATTACKS,
        "x_adv = into_ball(x_adv + alpha", "x_adv = into_ball(x_adv - alpha",
        (form(f"{OPTIMUM}[bim-inside the box]"),)),
    Bug("no clamp to the box", BALLS,
        "how)\n    return (x + delta).clamp_(0, 1)", "how)\n    return x + delta",
        (rule(f"{BALL}[float32-bim]"),)),
    Bug("projection around the last iterate instead of the image", ATTACKS,
        "nearest(z, x, eps, norm, projection)", "nearest(z, z, eps, norm, projection)",
        (rule(f"{BALL}[float32-bim]"),)),
    Bug("mean loss", CORE, "value.sum()", "value.mean()",
        (rule("an_image_alone_is_treated_as_in_a_batch[cw_l2]"),)),
    Bug("labels of other images once fooled ones have left", ATTACKS,
        "(t[left] for t in (x, y, x_adv, g, who, row))",
        "(t[:len(left)] if t is y else t[left] for t in (x, y, x_adv, g, who, row))",
        (form("stop_early_freezes_each_image_at_its_first_fooling_step_and_no_other[False]"),)),
    Bug("binary search for c in the wrong half", ATTACKS,
        "torch.where(success, low, c), torch.where(success, c, high)",
        "torch.where(success, c, low), torch.where(success, high, c)",
        (form("cw_moves_black_and_white_pixels_inwards_if_only_they_matter"),)),
    Bug("tanh is flat at black and white pixels", ATTACKS,
        "SQUEEZE = 0.1", "SQUEEZE = 1e-6",
        (form("cw_moves_black_and_white_pixels_inwards_if_only_they_matter"),)),
    Bug("random start outside the ball", BALLS,
        "return eps * torch.stack(drawn)", "return 2 * eps * torch.stack(drawn)",
        (form("random_starts_are_spread_evenly_over_the_ball[l2]"),)),
    Bug("momentum of gradients of any length", ATTACKS,
        'mu * v[who] + unit(g, "l1")', "mu * v[who] + g",
        (form("mim_is_the_naive_loop_with_a_running_mean_of_gradients_of_l1_norm_1[1.0]"),)),
    Bug("worst_case forgets whom it has fooled", ATTACKS,
        "result[who[fooled]], alive[who[fooled]] = x_adv[fooled], False",
        "result[who[fooled]] = x_adv[fooled]",
        (form("worst_case_runs_each_attack_on_survivors_only_and_unites_what_they_fooled"),)),
    Bug("eps as if pixels were in [-1, 1]", ATTACKS,
        "eps=eps, alpha=eps, steps=1", "eps=eps / 2, alpha=eps, steps=1",
        (form(f"{OPTIMUM}[fgsm-inside the box]"),)),
    Bug("targeted attacks flee their target", CORE,
        "-function(logits, y)", "function(logits, y)",
        (rule("towards_a_target_the_image_comes_nearer_to_its_class[bim]"),)),
    Bug("APGD never halves its step", APGD,
        "s.size / 2, s.size)", "s.size, s.size)",
        (form("apgd_halves_its_step_until_it_reaches_a_maximum_inside_the_ball[linf]"),)),
    Bug("Square accepts nothing that does not fool at once", SQUARE,
        "better = fooled | (f > best_f)\n        best,", "better = fooled\n        best,",
        (form("square_never_gets_worse_with_more_queries_and_counts_them"),)),
    Bug("the generator is ignored", CORE,
        "    if generator is None:\n", "    if True:\n",
        (rule("the_same_seed_gives_the_same_bytes_and_another_seed_others[pgd linf sign exact]"),)),
    Bug("random numbers from the global generator", BALLS,
        "2 * torch.rand(shape, generator=g) - 1", "2 * torch.rand(shape) - 1",
        (rule(f"{AS_BEFORE}[pgd linf sign exact]"),)),
    Bug("BatchNorm in train mode", CORE, "module.training = False", "module.training = mode",
        (rule(f"{EVAL}[fgsm]"),)),
    Bug("every module in train mode afterwards", CORE,
        "module.training = mode", "module.training = True",
        (rule(f"{AS_BEFORE}[fgsm]"),)),
    Bug("the maximum over the batch instead of the image", ATTACKS,
        'column(norm_of(g, "linf").clamp_min(TINY), g)', "g.abs().max()",
        (form("fgv_moves_the_pixel_of_the_largest_gradient_by_alpha_and_the_others_in_proportion"),)),
    Bug("L1 projection without the box", BALLS,
        "torch.minimum((size - column(t, size)).clamp_min_(0), room)",
        "(size - column(t, size)).clamp_min_(0)",
        (form(f"{NEAREST}[l1-torch.float64]"),)),
    Bug("L2 projection: ball first, box second", BALLS,
        "        reached = norm_of(inside, \"l2\")\n", "        break\n",
        (form(f"{NEAREST}[l2-torch.float64]"),)),
    Bug("of all restarts the highest loss, fooled or not", ATTACKS,
        "worse = (hit & ~fooled[who]) | ((hit == fooled[who]) & (f > value[who]))",
        "worse = f > value[who]",
        (form("of_all_restarts_the_worst_is_kept[the fooled one]"),)),
    Bug("one draw tells who is fooled", CORE,
        "is_fooled(mean, y, targeted)", "is_fooled(logits, y, targeted)",
        (form("an_image_is_fooled_if_the_mean_over_the_draws_is_and_not_one_lucky_draw"),)),
    Bug("a model may change the image", CORE,
        "if x._version != version:", "if False:",
        (form("a_model_that_works_in_place_on_its_input_is_refused"),)),
    Bug("eot sees its last draw only", CORE,
        "one if total is None else [a + b for a, b in zip(total, one, strict=True)]", "one",
        (form("eot_averages_the_gradients_of_the_loss_over_its_draws"),)),
    Bug("a NaN gradient is a gradient of no sign", CORE,
        "if not bool(peak.isfinite().all()):", "if False:",
        (rule("a_nan_gradient_is_refused_in_one_line_that_names_the_cause[fgsm]"),)),
    Bug("the layer of another formula", DEFENSES,
        "torch.sin(self.w * x)", "torch.cos(self.w * x)",
        (layer("it_is_the_formula_of_the_paper"),)),
    Bug("an adaptive attacker follows the layer's gradient", DEFENSES,
        "bpda(layer) if isinstance(layer, GradientConcealment) else layer", "layer",
        (layer(f"{UNDEFENDED}[0-fgsm]"),)),
    Bug("an adaptive attacker draws a random layer once", DEFENSES,
        "return eot(seen, draws) if any", "return seen if any",
        (layer("the_gradient_of_an_adaptive_attacker_is_the_mean_over_many_forward_passes"),)),
    Bug("one draw for the batch", DEFENSES,
        "(n,), generator=self.generator)", "(1,), generator=self.generator).expand(n)",
        (layer("all_sides_and_places_occur_within_the_square"),)),
    Bug("the same place in both directions", DEFENSES,
        "return side, *corner.minimum(room)", "return side, *corner[:1].minimum(room).expand(2, n)",
        (layer("all_sides_and_places_occur_within_the_square"),)),
    Bug("half a pixel off", DEFENSES,
        "(2 * line + 1).double()", "(2 * line).double()",
        (layer("every_image_is_scaled_and_pasted_on_black[20-24-shape0]"),)),
    Bug("images outside the ball count as fooled", CELLS,
        "torch.where(allowed, times_right(model, x_adv, y, draws), before[index])",
        "times_right(model, x_adv, y, draws)",
        (count("an_image_outside_the_ball_or_the_box_counts_as_not_attacked"),)),
    Bug("robustness over all images", CELLS,
        "share(_divide(both, draws * draws), right)",
        "share(_divide(both, draws * draws), cell['n'])",
        (count("attack_robustness_by_hand"),)),
    Bug("the best case", CELLS,
        "min(counts) for", "max(counts) for",
        (count("the_worst_case_is_taken_image_by_image_and_not_from_the_averages"),)),
    Bug("images leave a random network at the first lucky draw", GCM,
        "early=stop_early and not random", "early=stop_early",
        (count("images_never_leave_pgd_early_behind_a_random_defence"),)),
    Bug("falls of the loss count as rises", AUDIT,
        "(change.sum(0) /", "(change.abs().sum(0) /",
        (count("ascent_is_the_net_rise_over_the_total_variation"),)),
    Bug("another order of the attacks compared", AUDIT,
        'white - ar["square"] > POINTS', 'ar["square"] - white > POINTS',
        (count("every_sign_is_flagged_beyond_its_threshold_and_not_at_it"),)),
    Bug("delta starts anew at every replay", FREE,
        "delta.add_(alpha", "delta.copy_(alpha",
        (free("free_is_algorithm_1_written_naively"),)),
    Bug("the network sees images outside the box", FREE,
        "step((x + noise).clamp(0, 1), y)", "step(x + noise, y)",
        (free("free_is_algorithm_1_written_naively"),)),
    Bug("a replay too few", FREE,
        "for _ in range(m):", "for _ in range(m - 1):",
        (free("free_is_algorithm_1_written_naively"),)),
    Bug("free takes m times the budget", FREE,
        "math.ceil(s.epochs / s.replays)", "s.epochs",
        (free("the_budget_is_counted_in_weight_steps[free-8-24-3]"),)),
    Bug("passes rounded down", FREE,
        "math.ceil(s.epochs / s.replays)", "(s.epochs // s.replays)",
        (free("the_budget_is_counted_in_weight_steps[free-5-24-5]"),)),
    Bug("fast starts at the image", FREE,
        "eps * (2 * u - 1)", "eps * (0 * u)",
        (free("fast_takes_one_step_from_a_random_point"),)),
    Bug("every image mirrored", PASSES,
        "u[2, :, None] < 0.5", "u[2, :, None] < 1.5",
        (free("crops_and_mirrors_are_those_of_a_loop"),)),
    Bug("the clean gradient is lost", SHEET,
        "        loss.backward()\n        g = images.grad",
        "        g, = torch.autograd.grad(loss, images)",
        (sheet("the_joint_step_is_the_sum_of_two_gradients_computed_separately[fgs]"),)),
    Bug("FGS without the sign", ATTACKS,
        "(x + eps * g.sign())", "(x + eps * g)",
        (sheet("the_joint_step_is_the_sum_of_two_gradients_computed_separately[fgs]"),)),
    Bug("the true label where the predicted one is asked for", SHEET,
        "F.cross_entropy(logits, logits.argmax(1))", "F.cross_entropy(logits, y)",
        (sheet("with_the_predicted_label_the_attack_does_not_know_the_true_one"),)),
    Bug("adversarial accuracy over all images", SHEET,
        "share(count, right)", "share(count, len(images))",
        (sheet("the_adversarial_accuracy_counts_what_was_right_before_and_nothing_else"),)),
    Bug("adversarial images of what was wrong before", SHEET,
        "good = logits.argmax(1) == y", "good = torch.ones_like(y, dtype=torch.bool)",
        (sheet("the_adversarial_accuracy_counts_what_was_right_before_and_nothing_else"),)),
    Bug("noise inside the range", SHEET,
        "2 * torch.randint(0, 2, x.shape, generator=generator) - 1",
        "2 * torch.rand(x.shape, generator=generator) - 1",
        (sheet("noise_is_plus_or_minus_alpha_before_clipping"),)),
    Bug("the training attack goes through GCM", STAGES,
        "attacked = adaptive(self.defended)", "attacked = self.defended",
        (stage("the_training_attack_passes_around_gcm"),)),
    Bug("FGSM's weight forgotten", STAGES,
        "w_fgsm * loss(attack(x, y), y)", "loss(attack(x, y), y)",
        (stage("the_clean_and_the_adversarial_loss_by_hand"),)),
    Bug("the attacked images of the last step are the clean ones", STAGES,
        "loss(attack(x, y), y)", "loss(x, y)",
        (stage("the_clean_and_the_adversarial_loss_by_hand"),)),
    Bug("mixed images labelled as the first alone", STAGES,
        "w_mixup * loss(mixed, soft_labels)", "w_mixup * loss(mixed, y)",
        (stage("mixed_images_have_mixed_labels[mixup]"),)),
    Bug("one rate for head and backbone", STAGES,
        "s.lr_backbone * factor", "s.lr_head * factor",
        (stage("head_and_backbone_have_learning_rates_of_their_own[backbone]"),)),
    Bug("learning rates never cut", STAGES,
        "s.gamma ** (len(self.rows) // s.step_epochs)", "1.0",
        (stage("learning_rates_are_cut_in_steps"),)),
    Bug("the same augmentation in every pass", STAGES,
        "self.own_generator.manual_seed(seed)", "self.own_generator.manual_seed(0)",
        (stage("augmentations_are_drawn_anew_in_every_epoch"),)),
    Bug("the last epoch for the best", STAGES,
        'if (plain + augmented) / 2 > self.best["score"]:', "if True:",
        (stage("the_network_of_the_best_epoch_is_saved"),)),
    Bug("gradients of several processes halved", STAGES,
        "(loss * (self.team.size / joint)).backward()", "(loss / joint).backward()",
        (stage("two_processes_take_the_step_of_one"),)),
    Bug("tested on what was held out to choose", DATA,
        "if (test.root, test.names) != (train.root, train.names):", "if False:",
        (stage("a_data_set_with_a_test_split_is_tested_on_it"),)),
    Bug("accuracy under an augmentation of the plain image", EVALUATED,
        "right[name] += int((model(z)", "right[name] += int((model(x)",
        (network("the_accuracy_under_a_corruption_is_that_of_a_plain_loop"),)),
    Bug("queries that are learnt away", HEADS,
        "q = self.norm_query(q + self.dropout(q))", "q = self.norm_query(q)",
        ("tests/test_heads.py::test_ml_decoder_is_attention_written_naively",)),
    Bug("the attacker of eval_net.py does not know the defence", EVALUATED,
        "attack, adaptive(model, s.draws), model, images", "attack, model, model, images",
        (network("a_network_behind_gcm_is_attacked_by_the_adaptive_attacker"),)),
    Bug("measured without the defence", EVALUATED,
        "self.behind(make_generator(s.seed)), images, draws", "self.model, images, draws",
        (network("a_network_is_measured_behind_its_defence_in_all_draws"),)),
    Bug("another step size than the table says", EVALUATED,
        "alpha=eps / 4", "alpha=eps / 2",
        (network("the_cells_are_those_of_the_attacks_called_one_by_one"),)),
    Bug("tested on images that were trained on", FINISHED,
        '    if "hold_out" in facts:\n', "    if False:\n",
        (network("a_network_of_train_gcm_is_tested_on_images_that_were_held_out"),)),
    Bug("a resumed loop forgets its random numbers", LOOP,
        "restore = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict",
        "restore = str if isinstance(part, torch.Generator) else part.load_state_dict",
        ("tests/test_loop.py::test_a_run_stopped_after_any_epoch_resumes_to_the_same_weights_and_rows",
         )),
    Bug("a loss that is not finite is saved", LOOP,
        "if not math.isfinite(loss) or broken:", "if False:",
        ("tests/test_loop.py::test_a_loss_that_is_not_finite_stops_before_the_checkpoint",)),
]


def run_tests(folder, tests, log):
    """In a fork: pytest -x on the copy of src in `folder`; -> process id."""
    pid = os.fork()
    if pid:
        return pid
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["SRC_UNDER_TEST"] = folder
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]))


def main(jobs, at_once=2):
    """[(folder, tests, log)] -> the exit status of each pytest, in the same order."""
    status, running, waiting = {}, {}, list(enumerate(jobs))
    while waiting or running:
        if waiting and len(running) < at_once:
            i, job = waiting.pop(0)
            running[run_tests(*job)] = i
            continue
        pid, code = os.wait()
        status[running.pop(pid)] = os.waitstatus_to_exitcode(code)
    return [status[i] for i in range(len(jobs))]


if __name__ == "__main__":
    import pytest
    import torchvision  # noqa: F401  # once for all forks, and torch with it

    print(json.dumps(main(json.load(sys.stdin))))
