"""One-line bugs typical of attack code, each with a few quick tests that must catch it.

test_attack_bugs.py plants each in its own copy of src and runs this file, which runs their tests.
Every pytest is a fork of one process that has imported torch, as the import takes most of the time.
"""

import json
import os
import sys
from dataclasses import dataclass

ATTACKS, CORE, BALLS = "attacks.py", "utils/attack/core.py", "utils/attack/balls.py"
APGD, SQUARE = "utils/attack/apgd.py", "utils/attack/square.py"
FAB, SEVERAL = "utils/attack/fab.py", "utils/attack/several.py"
CHANCE, TELLING = "utils/attack/chance.py", "utils/attack/random_layers.py"
DEFENSES, CELLS, AUDIT = "utils/defenses.py", "utils/measure.py", "utils/audit.py"
GCM = "gcm.py"
FREE, SHEET, PASSES = "free_at.py", "fgsm_mnist.py", "utils/passes.py"
RECIPES = "utils/recipes.py"
DATA, LOOP, FINISHED = "utils/data.py", "utils/loop.py", "utils/finished.py"
SGA, UNIVERSAL = "train_sga.py", "utils/attack/universal.py"
MAXIMIN = "utils/attack/maximin.py"
STAGES, EVALUATED, HEADS = "train_gcm.py", "utils/tested.py", "utils/nets.py"
AUGMENT = "utils/augment.py"


@dataclass(frozen=True)
class Bug:
    """Replaces `old`, which occurs once in `file`, by `new`; `tests` (node ids) must then fail."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple


def stage(name):
    return f"tests/test_challenge.py::test_{name}"


def form(name):
    return f"tests/test_attacks.py::test_{name}"


def few(name):
    return f"tests/test_attacks_few_classes.py::test_{name}"


def paper(name):
    return f"tests/test_attacks_papers.py::test_{name}"


def rule(name):
    return f"tests/test_attacks_contract.py::test_{name}"


def drawn(name):
    return f"tests/test_chance.py::test_{name}"


def layer(name):
    return f"tests/test_defenses.py::test_{name}"


def count(name):
    return f"tests/test_measure.py::test_{name}"


def border(name):
    return f"tests/test_fab.py::test_{name}"


def extra(name):
    return f"tests/test_eval_extras.py::test_{name}"


def whole(name):
    return f"tests/test_autoattack.py::test_{name}"


def waiting(name):
    return f"tests/test_no_waiting.py::test_{name}"


def free(name):
    return f"tests/test_free.py::test_{name}"


def augmented(name):
    return f"tests/test_augment.py::test_{name}"


def shared(name):
    return f"tests/test_sga_team.py::test_{name}"


def recipe(name):
    return f"tests/test_recipes.py::test_{name}"


def network(name):
    return f"tests/test_eval_net.py::test_{name}"


def sheet(name):
    return f"tests/test_exercise.py::test_{name}"


def sure(name):
    return f"tests/test_maximin.py::test_{name}"


def uap(name):
    return f"tests/test_universal.py::test_{name}"


OPTIMUM = "attacks_reach_the_optimum_of_a_linear_model_and_do_not_exceed_it"
BALL = "the_result_is_in_the_ball_and_in_the_box_and_worse_than_the_clean_image"
AS_BEFORE = "model_images_labels_and_the_global_rng_are_left_unchanged"
EVAL = "an_attack_runs_the_model_in_eval_mode_whatever_its_mode_even_under_no_grad"
UNDEFENDED = "an_adaptive_attack_on_gcm_gives_the_images_of_the_undefended_network"
STEPS = "apgd_takes_the_steps_of_its_paper_whatever_the_losses"
CURVED = "apgd_on_a_curved_network_follows_its_paper_image_by_image"
L1_STAGES = "the_l1_stages_follow_the_paper_each_from_the_best_point_of_the_one_before"
QUERIES = "square_follows_its_paper_query_by_query"
PUBLISHED = "the_gradient_equals_that_of_the_published_loop_in_any_chunks"
COSINE = "the_cosine_of_logits_or_features_equals_the_naive_oracle"
MEMBERS = "the_strongest_attack_runs_its_members_in_turn_on_the_surviving_images"
ITERATION = "fab_follows_its_paper_image_by_image"
NEAREST = "the_projection_is_the_nearest_allowed_point"

BUGS = [
    Bug("a step down the loss", ATTACKS,
        "direction(g, who, x_adv), alpha=alpha)", "direction(g, who, x_adv), alpha=-alpha)",
        (form(f"{OPTIMUM}[bim-inside the box]"),)),
    Bug("no clamp to the box", BALLS,
        "else delta.add_(x).clamp_(0, 1)", "else delta.add_(x)",
        (rule(f"{BALL}[float32-bim]"),)),
    Bug("projection around the last iterate instead of the image", ATTACKS,
        "nearest(z, x, eps, norm.name, norm.p", "nearest(z, z, eps, norm.name, norm.p",
        (rule(f"{BALL}[float32-bim]"),)),
    Bug("mean loss", CORE, "value.sum()", "value.mean()",
        (rule("an_image_gets_the_same_result_alone_and_in_a_batch[cw_l2]"),)),
    Bug("labels of other images once fooled ones have left", ATTACKS,
        "(t[left] for t in (x, y, x_adv, g, who, row))",
        "(t[:len(left)] if t is y else t[left] for t in (x, y, x_adv, g, who, row))",
        (form("stop_early_freezes_each_image_at_its_first_fooling_step_and_no_other[False]"),)),
    Bug("binary search for c in the wrong half", ATTACKS,
        "torch.where(success, low, c), torch.where(success, c, high)",
        "torch.where(success, c, low), torch.where(success, high, c)",
        (form("cw_moves_black_and_white_pixels_inwards_if_only_they_matter"),)),
    Bug("tanh is flat at black and white pixels", ATTACKS,
        "SQUEEZE = 0.02", "SQUEEZE = 1e-6",
        (form("cw_moves_black_and_white_pixels_inwards_if_only_they_matter"),)),
    Bug("random start outside the ball", BALLS,
        "return eps * drawn", "return 2 * eps * drawn",
        (form("random_starts_are_spread_evenly_over_the_ball[l2]"),)),
    Bug("momentum of gradients of any length", ATTACKS,
        'mu * v[who] + unit(g, "l1")', "mu * v[who] + g",
        (form("mim_equals_the_naive_loop_with_momentum_over_gradients_of_l1_norm_1[1.0]"),)),
    Bug("worst_case forgets whom it has fooled", SEVERAL,
        "result[who[fooled]], alive[who[fooled]] = x_adv[fooled], False",
        "result[who[fooled]] = x_adv[fooled]",
        (form("worst_case_runs_each_attack_on_survivors_only_and_combines_what_they_fooled"),)),
    Bug("the strongest attack does not choose its classes", SEVERAL,
        'apgd, loss="dlr_targeted" if', 'apgd, loss="dlr" if',
        (form(f"{MEMBERS}[4-APGD-T (3 targets)-dlr_targeted]"),)),
    Bug("three classes are two targets, of which one is tried", SEVERAL,
        "min(published, classes - 1)", "min(published, max(classes - 2, 1))",
        (form(f"{MEMBERS}[3-APGD-T (2 targets, margin loss)-margin_targeted]"),)),
    Bug("the strongest attack wants a targeted DLR of three classes", SEVERAL,
        "TARGETS, ENOUGH = 9, 4", "TARGETS, ENOUGH = 9, 3",
        (few("the_strongest_attack_needs_no_warning_because_its_title_says_what_runs[3]"),)),
    Bug("the label is one of its own targets", CORE,
        "min(targets, wrong)", "targets",
        (paper("apgd_on_few_classes_runs_once_towards_each_wrong_class[dlr_targeted-linf-0.05-9"
               "-2]"),
         few("a_warning_says_when_there_are_fewer_wrong_classes_than_targets"))),
    Bug("DLR of three classes is the margin", CORE,
        "_too_few(logits, 3)", "_too_few(logits, 4)",
        (few("pgd_on_dlr_equals_naive_pgd_on_the_loss_used_instead[linf-3-False-dlr]"),)),
    Bug("targeted DLR of three classes flees its target", CORE,
        "return -margin(logits, y) / _targeted", "return margin(logits, y) / _targeted",
        (few("pgd_on_dlr_equals_naive_pgd_on_the_loss_used_instead[linf-3-True-margin]"),)),
    Bug("a network of one class is attacked", CORE,
        "if classes < 2:", "if classes < 1:",
        (rule("a_model_of_one_class_is_refused_in_one_line_that_says_what_to_do_with_a_single_"
              "logit[pgd linf sign exact]"),)),
    Bug("eps as if pixels were in [-1, 1]", ATTACKS,
        "eps=eps, alpha=eps, steps=1", "eps=eps / 2, alpha=eps, steps=1",
        (form(f"{OPTIMUM}[fgsm-inside the box]"),)),
    Bug("targeted attacks flee their target", CORE,
        "-function(logits, y)", "function(logits, y)",
        (rule("a_targeted_attack_moves_the_image_closer_to_the_target_class[bim]"),)),
    Bug("APGD never halves its step", APGD,
        "s.size / 2, s.size)", "s.size, s.size)",
        (form("apgd_halves_its_step_until_it_reaches_a_maximum_inside_the_ball[linf]"),)),
    Bug("Square accepts nothing that does not fool at once", SQUARE,
        "better = (fools | (f > best_f)) & ~fooled", "better = fools & ~fooled",
        (form("square_never_gets_worse_with_more_queries_and_counts_them"),)),
    Bug("APGD never asks whether the best loss has risen", APGD,
        " | (~s.halved & (s.best_f <= s.checked_f))", "",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD halves its step where less than half of the steps rose", APGD,
        "rho * checkpoints[t]", "rho * checkpoints[t] * 2 / 3",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD's checkpoints are equally far apart", APGD,
        "length = max(length - max(int(0.03 * steps), 1), max(", "length = max(length, max(",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD's momentum is three quarters", APGD,
        "0.75 if t else 1.0", "0.25 if t else 1.0",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD goes on from where it is instead of the best point", APGD,
        "column(stalled, s.x), s.best, s.at)", "column(stalled, s.x), s.at, s.at)",
        (paper(f"{STEPS}[linf]"),)),
    Bug("back at the best point with the gradient of another", APGD,
        "s.best_g, s.g)\n    s.last_f", "s.g, s.g)\n    s.last_f",
        (paper(f"{STEPS}[linf]"),)),
    Bug("back at the best point with the loss of another", APGD,
        "torch.where(stalled, s.best_f, s.last_f)", "s.last_f",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD returns its last point", APGD,
        "zip(found, (s.best, s.best_f", "zip(found, (s.at, s.best_f",
        (paper(f"{STEPS}[linf]"),)),
    Bug("APGD returns the point of the highest loss, fooled or not", APGD,
        "torch.where(column(climbed | first,", "torch.where(column(climbed,",
        (paper("apgd_returns_the_point_that_fools_even_if_another_has_a_higher_loss"),)),
    Bug("APGD in L1 counts what the last point has moved", APGD,
        "moved = (s.best != x)", "moved = (s.at != x)",
        (paper(f"{STEPS}[l1]"),)),
    Bug("targeted DLR over z_1 - z_3", CORE,
        "(top[:, 2] + top[:, 3]) / 2", "top[:, 2]",
        (paper(f"{CURVED}[linf dlr_targeted]"),)),
    Bug("targeted DLR towards the least likely classes", CORE,
        "argsort(1, descending=True)", "argsort(1)",
        (paper(f"{CURVED}[linf dlr_targeted]"),)),
    Bug("Square's hills are flat at the top", SQUARE,
        "falling[torch.maximum(r, c)]", "falling[(torch.maximum(r, c) - 1).clamp_min(0)]",
        (paper(f"{QUERIES}[l2]"),)),
    Bug("Square's hills are a row off the middle", SQUARE,
        "(torch.arange(h, device=x.device) - h // 2)",
        "(torch.arange(h, device=x.device) - (h - 1) // 2)",
        (paper(f"{QUERIES}[l2]"),)),
    Bug("the mass of an L2 square is the whole radius for each channel", SQUARE,
        ".clamp_min(0) / x.shape[1]", ".clamp_min(0)",
        (paper(f"{QUERIES}[l2]"),)),
    Bug("Square's schedule is for 10,000 queries whatever their number", SQUARE,
        "t * PUBLISHED // planned", "t",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("sides of squares rounded down", SQUARE,
        "round(math.sqrt(p * h * w))", "int(math.sqrt(p * h * w))",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("Square starts from horizontal stripes", SQUARE,
        "signs(x.shape[1], 1, x.shape[3])", "signs(x.shape[1], x.shape[2], 1)",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("Square keeps changes that gain nothing", SQUARE,
        "better = (fools | (f > best_f)) & ~fooled", "better = (fools | (f >= best_f)) & ~fooled",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("one sign for all channels of a square", SQUARE,
        "sign = torch.where(u[:, 5:] < 0.5, -1.0, 1.0).to(x)  # (n, C)",
        "sign = torch.where(u[:, 5:6] < 0.5, -1.0, 1.0).to(x)  # (n, C)",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("images that Square has fooled stay in the batch", SQUARE,
        "if due(t, x) and", "if False and",
        (paper(f"{QUERIES}[linf]"),)),
    Bug("FAB goes to the plane and not a little beyond", FAB,
        "ETA, BETA = 0.1, 1.05", "ETA, BETA = 0.1, 1.0", (border(f"{ITERATION}[l2]"),)),
    Bug("FAB never steps back from an adversarial image", FAB,
        "1.05, 0.9  #", "1.05, 1.0  #", (border(f"{ITERATION}[l2]"),)),
    Bug("FAB is not drawn towards the clean image", FAB,
        "ALPHA_MAX, ETA, BETA = 0.1", "ALPHA_MAX, ETA, BETA = 0.0",
        (border(f"{ITERATION}[linf]"),)),
    Bug("FAB looks at the plane as if it went through the clean image's value", FAB,
        "f_x = f + (g * (s.x - s.at)).flatten(1).sum(1)", "f_x = f",
        (border(f"{ITERATION}[linf]"),)),
    Bug("FAB keeps its last adversarial image instead of the nearest", FAB,
        "nearer = fooled & (here < s.size) & ~s.done", "nearer = fooled & ~s.done",
        (border(f"{ITERATION}[linf]"),)),
    Bug("FAB flees the border", FAB, "-torch.cat([f, f_x]), norm", "torch.cat([f, f_x]), norm",
        (border("fab_finds_the_nearest_image_of_a_linear_network[l2-greys-5]"),)),
    Bug("a plane in Linf as if in L2", FAB, 'far * slope if norm == "l2"', 'far * slope if norm',
        (border("the_projection_onto_a_plane_equals_that_of_a_bisection[linf-torch.float64]"),)),
    Bug("a plane without the box", FAB, "room_of(z, side) * side.abs()", "side.abs()",
        (border("the_projection_onto_a_plane_equals_that_of_a_bisection[l2-torch.float64]"),)),
    Bug("a plane in L1 by the coordinates of the smallest slopes", FAB,
        "sort(1, descending=True)", "sort(1)",
        (border("the_projection_onto_a_plane_equals_that_of_a_bisection[l1-torch.float64]"),)),
    Bug("FAB succeeds outside the radius", FAB,
        "success = size <= eps if eps < math.inf else size.isfinite()",
        "success = size.isfinite()",
        (border("fab_with_a_radius_succeeds_where_the_nearest_image_is_inside"),)),
    Bug("FAB starts again where it started", FAB,
        "norm, own[who].fold(k)) if k >= len(goals) \\\n", "norm, own[who].fold(k)) if False \\\n",
        (border("restarts_begin_at_half_of_the_smallest_norm_or_radius[None]"),)),
    Bug("FAB's images stay in the batch once they are within the radius", FAB,
        "        s.done = s.size <= eps", "        pass",
        (border("images_within_the_radius_leave_the_batch"),)),
    Bug("hills of L2 in L1", SQUARE, '"l1": 4}', '"l1": 2}', (paper(f"{QUERIES}[l1]"),)),
    Bug("the mass of an L1 square is that of its channel", SQUARE,
        "else budget * x.shape[1]", "else budget", (paper(f"{QUERIES}[l1]"),)),
    Bug("all stages at the radius itself", APGD,
        "[(3, larger), (2, larger)", "[(1, larger), (1, larger)",
        (whole("the_first_steps_in_l1_are_taken_in_larger_balls"),)),
    Bug("the stages of L1 begin with long steps of many entries", APGD,
        "moved / entries / 1.5 if stages", "moved / entries / 1.5 if False", (paper(L1_STAGES),)),
    Bug("images that a larger ball fools go no further", APGD,
        "is_fooled(logits, s.y, targeted) & inside", "is_fooled(logits, s.y, targeted)",
        (whole("an_image_fooled_only_outside_the_radius_does_not_count_as_fooled"),)),
    Bug("a smaller ball is entered from outside", APGD,
        "nearest(at, x, times * eps, norm)", "at",
        (whole("the_first_steps_in_l1_are_taken_in_larger_balls"),)),
    Bug("AutoAttack plus without Square", SEVERAL,
        "return again | queries | towards", "return again | towards",
        (whole("plus_and_rand_run_all_their_members_in_their_order[plus]"),)),
    Bug("AutoAttack rand without APGD-DLR", SEVERAL,
        'return {"APGD-CE": climb} | dlr', 'return {"APGD-CE": climb}',
        (whole("plus_and_rand_run_all_their_members_in_their_order[rand]"),)),
    Bug("AutoAttack rand with the draws of the defended model alone", SEVERAL,
        "return ceil(DRAWS / draws)", "return DRAWS if draws == 1 else 1",
        (whole("rand_averages_at_least_twenty_draws_of_a_random_network"),)),
    Bug("AutoAttack's Square has the schedule of its queries", SEVERAL,
        "queries=QUERIES, rescale=False", "queries=QUERIES, rescale=True",
        (whole("the_members_have_the_settings_of_the_authors"),)),
    Bug("AutoAttack in L1 starts at the radius", SEVERAL,
        "climb = partial(apgd, stages=l1, **same)", "climb = partial(apgd, stages=False, **same)",
        (whole("the_members_have_the_settings_of_the_authors"),)),
    Bug("every random defence passes for one that is not", SEVERAL,
        "> SAME * one.norm(dim=1)", "> one.norm(dim=1)",
        (whole("a_flag_says_what_looks_wrong[random-said2]"),)),
    Bug("a loss that never rose is not noticed", APGD,
        "alive & (value <= clean_f)", "alive & (value < -math.inf)",
        (whole("a_flag_says_what_looks_wrong[flat-said1]"),)),
    Bug("saved images are rounded out of the ball", "utils/saved.py",
        "near = near.clamp(-most, most)", "pass",
        (extra("rounded_images_are_levels_inside_the_ball[greys-linf-0.03490196078431373]"),)),
    Bug("saved images are measured before they are saved", CELLS,
        "right8 = count_right(model, x8, y", "right8 = count_right(model, x, y",
        (extra("saved_images_are_measured_after_saving_and_again_by_from_images"),)),
    Bug("saved images are measured on the clean ones", "utils/saved.py",
        "found[k] = read_png(path, found[k]).to(x.device)", "read_png(path, found[k])",
        (extra("saved_images_are_measured_after_saving_and_again_by_from_images"),)),
    Bug("a curve forgets whom a smaller radius has fooled", "utils/curves.py",
        'left = done[key]["after"]', "left = clean",
        (extra("a_curve_runs_the_attack_at_every_radius_on_the_surviving_images"),)),
    Bug("FAB's curve counts the images inside", "utils/curves.py", "size > eps]", "size < eps]",
        (extra("the_curve_of_fab_counts_the_images_that_are_farther_away"),)),
    Bug("a transfer table whose lines are its columns", "utils/transfer.py",
        "net.defended, x_adv, y, net.draws", "source.defended, x_adv, y, net.draws",
        (extra("a_transfer_measures_the_sources_images_on_the_target[False]"),)),
    Bug("every image is diverse", "utils/attack/diverse.py", ".to(x) < self.p", ".to(x) < 1",
        (extra("diverse_inputs_change_about_the_given_share_of_images"),)),
    Bug("gradients are blurred to another size", "utils/attack/diverse.py",
        "linspace(-SPREAD, SPREAD", "linspace(-1, 1",
        (extra("blurred_gradients_equal_those_of_a_loop"),)),
    Bug("the generator is ignored", CHANCE,
        "    if generator is None:\n", "    if True:\n",
        (rule("the_same_seed_gives_the_same_bytes_and_another_seed_different_ones"
              "[pgd linf sign exact]"),)),
    Bug("nine rounds", CHANCE, "range(10)", "range(9)",
        (drawn("philox_gives_the_answers_of_random123[pi]"),)),
    Bug("random numbers belong to the place in the batch", CHANCE,
        "image = self.images[:, None]", "image = torch.arange(n)[:, None]",
        (rule("random_numbers_follow_their_images"),)),
    Bug("random layers count draws of the batch", TELLING,
        "batch.turn[batch.rows] += 1", "batch.turn += 1",
        (layer("a_random_layer_told_of_its_images_draws_the_same_for_each_in_any_batch_and_order"
               ),)),
    Bug("an attack does not say which images are left", CORE,
        "with rows_passing(index):", "with rows_passing(slice(None)):",
        (rule("a_random_layer_gives_an_image_the_same_draws_alone_and_in_a_batch_that_others_leave"
              "[pgd stop_early]"),)),
    Bug("an attacker knows the draws of the evaluation", CORE,
        "drawing_from(own.fold(LAYERS))", "drawing_from(own)",
        (layer("an_attacker_does_not_know_the_draws_that_judge_its_images"),)),
    Bug("images are judged by the draws that they were attacked with", CELLS,
        "(model, x_adv, y, draws, own.fold(AFTER", "(model, x_adv, y, draws, own.fold(ATTACK",
        (count("draws_before_and_after_an_attack_are_independent"),)),
    Bug("the same start after every restart", ATTACKS,
        "norm.name, own[who].fold(k)), x0", "norm.name, own[who].fold(0)), x0",
        (form("the_worst_of_all_restarts_is_kept[the higher loss]"),)),
    Bug("random numbers from the global generator", BALLS,
        "2 * chance.uniform(*shape) - 1", "2 * torch.rand(x.shape) - 1",
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
        "torch.minimum((size - column(t, size)).clamp_min_(0), room)\n    return",
        "(size - column(t, size)).clamp_min_(0)\n    return",
        (form(f"{NEAREST}[l1-torch.float64]"),)),
    Bug("L2 projection: ball first, box second", BALLS,
        "        reached = norm_of(inside, \"l2\")\n", "        break\n",
        (form(f"{NEAREST}[l2-torch.float64]"),)),
    Bug("of all restarts the highest loss, fooled or not", ATTACKS,
        "worse = (hit & ~fooled[who]) | ((hit == fooled[who]) & (f > value[who]))",
        "worse = f > value[who]",
        (form("the_worst_of_all_restarts_is_kept[the fooled one]"),)),
    Bug("one draw tells who is fooled", CORE,
        "is_fooled(mean, y, targeted)", "is_fooled(logits, y, targeted)",
        (form("an_image_counts_as_fooled_by_the_mean_over_draws_and_not_by_one_lucky_draw"),)),
    Bug("a model may change the image", CORE,
        "x._version != version\n", "False\n",
        (form("a_model_that_works_in_place_on_its_input_is_refused"),)),
    Bug("eot sees its last draw only", CORE,
        "one if total is None else [a + b for a, b in zip(total, one, strict=True)]", "one",
        (form("eot_averages_the_gradients_of_the_loss_over_its_draws"),)),
    Bug("a NaN gradient is a gradient of no sign", CORE,
        "fine = peak.isfinite()", "fine = ~(peak.isnan() & peak.isinf())",
        (rule("a_nan_gradient_is_refused_in_one_line_that_names_the_cause[fgsm]"),)),
    Bug("a NaN gradient moves the image until it is reported", CORE,
        "if not free_to_ask(g):", "if False:",
        (waiting("what_breaks_on_the_way_is_refused_with_the_same_line[pgd l2 normalized exact-"
                 "gradient]"),)),
    Bug("what breaks on the way is never reported", CORE,
        "if self.wrong:", "if False:",
        (waiting("what_breaks_on_the_way_is_refused_with_the_same_line[bim-logits]"),)),
    Bug("each step asks whether the logits are finite", CORE,
        "if not (self.first or free_to_ask(fine)):", "if False:",
        (waiting("no_step_of_an_attack_waits[bim]"),)),
    Bug("queries of images that wait to leave are counted", SQUARE,
        "else (~fooled).sum())", "else len(row))",
        (waiting("without_asking_the_images_and_the_report_are_the_same[square linf-3]"),)),
    Bug("APGD's images that wait to leave go on", APGD,
        "self.fooled = self.fooled | hit", "self.fooled = hit",
        (waiting("fooled_images_that_wait_long_to_leave_change_nothing[apgd linf ce-3]"),)),
    Bug("without asking, images inside the ball are pushed to its surface", BALLS,
        "torch.where(enough | within, t, t_next)", "torch.where(enough, t, t_next)",
        (waiting("projections_in_a_fixed_number_of_rounds_are_the_same[l2-torch.float32]"),)),
    Bug("the layer of another formula", DEFENSES,
        "torch.sin(self.w * x)", "torch.cos(self.w * x)",
        (layer("gcm_computes_the_formula_of_the_paper"),)),
    Bug("an adaptive attacker follows the layer's gradient", DEFENSES,
        "bpda(layer) if isinstance(layer, GradientConcealment) else layer", "layer",
        (layer(f"{UNDEFENDED}[0-fgsm]"),)),
    Bug("an adaptive attacker draws a random layer once", DEFENSES,
        "return eot(seen, draws) if any", "return seen if any",
        (layer("the_gradient_of_an_adaptive_attacker_is_the_mean_over_many_forward_passes"),)),
    Bug("one draw for the batch", DEFENSES,
        ".words(3).unbind(1)", ".words(3)[:1].expand(len(x), 3).unbind(1)",
        (layer("all_sides_and_places_occur_within_the_square"),)),
    Bug("the same place in both directions", DEFENSES,
        "for word in two)", "for word in two[:1] * 2)",
        (layer("all_sides_and_places_occur_within_the_square"),)),
    Bug("half a pixel off", DEFENSES,
        "(2 * line + 1 - side)", "(2 * line - side)",
        (layer("every_image_is_scaled_and_pasted_on_black[20-24-shape0]"),)),
    Bug("images outside the ball count as fooled", CELLS,
        "torch.where(allowed, right, before[index]).tolist()", "right.tolist()",
        (count("an_image_outside_the_ball_or_the_box_counts_as_not_attacked"),)),
    Bug("robustness over all images", CELLS,
        '"attack_robustness": share(both, right)', '"attack_robustness": share(both, cell["n"])',
        (count("attack_robustness_equals_that_counted_by_hand"),)),
    Bug("an image that is repaired counts as robust", CELLS,
        'robust_acc=share(c["both"], n)', 'robust_acc=share(c["adv"], n)',
        ("tests/test_eval.py::"
         "test_an_image_that_the_perturbation_repairs_counts_in_adv_acc_and_not_in_robust_acc",)),
    Bug("the best case", CELLS,
        "min(counts) for", "max(counts) for",
        (count("the_worst_case_is_taken_image_by_image_and_not_from_the_averages"),)),
    Bug("images leave a random network at the first lucky draw", GCM,
        "early=stop_early and not draws", "early=stop_early",
        (count("images_never_leave_pgd_early_behind_a_random_defence"),)),
    Bug("falls of the loss count as rises", AUDIT,
        "return change.sum(0) /", "return change.abs().sum(0) /",
        (count("ascent_is_the_net_rise_over_the_total_variation"),)),
    Bug("another order of the attacks compared", AUDIT,
        'white - ar["square"] > POINTS', 'ar["square"] - white > POINTS',
        (count("every_sign_is_flagged_beyond_its_threshold_and_not_at_it"),)),
    Bug("delta starts anew at every replay", FREE,
        "delta.add_(alpha", "delta.copy_(alpha",
        (free("free_equals_algorithm_1_written_naively"),)),
    Bug("the network sees images outside the box", FREE,
        "step(cut(x + noise), y)", "step(x + noise, y)",
        (free("free_equals_algorithm_1_written_naively"),)),
    Bug("a replay too few", FREE,
        "for _ in range(m):", "for _ in range(m - 1):",
        (free("free_equals_algorithm_1_written_naively"),)),
    Bug("black pixels without a gradient", FREE,
        "step(cut(x + noise), y)", "step((x + noise - 1e-7).clamp(0, 1), y)",
        (free("under_ball_delta_never_moves_where_x_plus_delta_is_outside_the_image"),)),
    Bug("the box of other images", FREE,
        "    delta.clamp_(low, high)  #", "    #",
        (free("under_box_x_plus_delta_stays_in_the_image_and_no_pixel_of_delta_is_dead"),)),
    Bug("a peak too early", RECIPES,
        '"triangle": 0.5', '"triangle": 0.4',
        (recipe("steps_passes_and_learning_rates_are_the_published_ones"
                "[cifar10-fast_adversarial]"),)),
    Bug("weight decay of BatchNorm", RECIPES,
        '"weight_decay": 0.0}]', '"weight_decay": s.weight_decay}]',
        (recipe("weight_decay_of_weights_leaves_batch_norm_and_biases_alone"),)),
    Bug("padding on both sides", HEADS,
        "F.pad(out, (0, 1, 0, 1))", "F.pad(out, (1, 0, 1, 0))",
        (recipe("a_unit_of_the_wide_network_equals_tensorflows[4-8-2-False]"),)),
    Bug("tested on the images of an older training", FINISHED,
        "    left = images.without(train.names)\n", "    left = images\n",
        (network("a_network_is_never_tested_on_its_training_images"),)),
    Bug("nothing held out", RECIPES,
        "return (images.without(held.names), len(held))", "return (images, len(held))",
        (free("without_a_test_split_a_run_is_measured_on_unseen_images[flags0-60-6]"),
         )),
    Bug("free takes m times the budget", RECIPES,
        "math.ceil(s.epochs / s.replays)", "s.epochs",
        (free("the_budget_is_counted_in_weight_steps[free-8-24-3]"),)),
    Bug("passes rounded down", RECIPES,
        "math.ceil(s.epochs / s.replays)", "(s.epochs // s.replays)",
        (free("the_budget_is_counted_in_weight_steps[free-5-24-5]"),)),
    Bug("fast starts at the image", FREE,
        "eps * (2 * u - 1)", "eps * (0 * u)",
        (free("fast_takes_one_step_from_a_random_point"),)),
    Bug("every image mirrored", PASSES,
        "u[2, :, None] < 0.5", "u[2, :, None] < 1.5",
        (free("crops_and_mirrors_equal_those_of_a_loop"),)),
    Bug("the clean gradient is lost", SHEET,
        "        loss.backward()\n        g = images.grad",
        "        g, = torch.autograd.grad(loss, images)",
        (sheet("the_joint_step_is_the_sum_of_two_gradients_computed_separately[fgs]"),)),
    Bug("FGS without the sign", ATTACKS,
        "(x + eps * g.sign())", "(x + eps * g)",
        (sheet("the_joint_step_is_the_sum_of_two_gradients_computed_separately[fgs]"),)),
    Bug("the true label where the predicted one is asked for", SHEET,
        "F.cross_entropy(logits, logits.argmax(1))", "F.cross_entropy(logits, y)",
        (sheet("an_attack_on_the_predicted_label_does_not_use_the_true_one"),)),
    Bug("adversarial accuracy over all images", SHEET,
        "share(count, right if", "share(count, len(images) if",
        (sheet("the_adversarial_accuracy_counts_only_images_classified_correctly_before"),)),
    Bug("adversarial images of what was wrong before", SHEET,
        "good = logits.argmax(1) == y", "good = torch.ones_like(y, dtype=torch.bool)",
        (sheet("the_adversarial_accuracy_counts_only_images_classified_correctly_before"),)),
    Bug("noise inside the range", SHEET,
        "2 * torch.randint(0, 2, x.shape, generator=generator) - 1",
        "2 * torch.rand(x.shape, generator=generator) - 1",
        (sheet("noise_is_plus_or_minus_alpha_before_clipping"),)),
    Bug("SGD with momentum in the exercise", "utils/exercise.py",
        "Optimizer(torch.optim.SGD, 0.05)",
        "Optimizer(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 0.05)",
        (sheet("sgd_takes_the_step_of_the_sheet_along_the_sum_of_both_gradients"),)),
    Bug("the curve's PGD-40 on a network in training mode", SHEET,
        "accuracies(self.model.eval(), self.test", "accuracies(self.model, self.test",
        (sheet("the_curve_measures_the_network_in_evaluation_mode"),)),
    Bug("the training attack goes through GCM", STAGES,
        "attacked = adaptive(self.defended)", "attacked = self.defended",
        (stage("the_training_attack_bypasses_gcm"),)),
    Bug("FGSM's weight forgotten", STAGES,
        "yield weight / 2, x_adv, y", "yield 0.5, x_adv, y",
        (stage("both_signs_of_both_fgsm_terms_equal_those_computed_by_hand"),)),
    Bug("the attacked images of the last step are the clean ones", STAGES,
        "yield weight / 2, x_adv, y", "yield weight / 2, x, y",
        (stage("both_signs_of_both_fgsm_terms_equal_those_computed_by_hand"),)),
    Bug("FGSM with one sign", STAGES,
        "fgs_step(x, g, eps), attacks.fgs_step(x, g, -eps)",
        "fgs_step(x, g, eps), attacks.fgs_step(x, g, eps)",
        (stage("both_signs_of_both_fgsm_terms_equal_those_computed_by_hand"),)),
    Bug("targeted FGSM at the true class", STAGES,
        "(s.w_fgsm_target, drawn.eps_target, drawn.target)",
        "(s.w_fgsm_target, drawn.eps_target, y)",
        (stage("both_signs_of_both_fgsm_terms_equal_those_computed_by_hand"),)),
    Bug("gradients never averaged over processes", STAGES,
        "with without_sync(self.parallel) if left else nullcontext():",
        "with without_sync(self.parallel):",
        (stage("gradients_are_averaged_over_processes_once_per_step"),)),
    Bug("mixed images labelled as the first alone", STAGES,
        "yield s.w_mixup, *v2.MixUp(**mixing)(x, y)",
        "yield s.w_mixup, v2.MixUp(**mixing)(x, y)[0], F.one_hot(y, len(s.classes))",
        (stage("mixed_images_have_mixed_labels[w_mixup]"),)),
    Bug("one rate for head and backbone", STAGES,
        "s.lr_backbone * factor", "s.lr_head * factor",
        (stage("head_and_backbone_have_their_own_learning_rates[backbone]"),)),
    Bug("learning rates never cut", STAGES,
        "s.gamma ** (len(self.rows) // s.step_epochs)", "1.0",
        (stage("learning_rates_are_cut_in_steps"),)),
    Bug("the same augmentation in every pass", STAGES,
        "own = attacks.Chance(seed, index)", "own = attacks.Chance(0, index)",
        (stage("augmentations_are_drawn_anew_in_every_epoch"),)),
    Bug("an augmentation's numbers go by the place in the batch", AUGMENT,
        "CHANGES[name](out[rows], stream[rows])", "CHANGES[name](out[rows], stream[:len(rows)])",
        (augmented("an_image_gets_the_same_result_alone_and_in_any_batch_or_order[pepper_salt]"),)),
    Bug("two fields of noise are one", AUGMENT,
        "self.fields += 1", "self.fields = 1",
        (augmented("extend_takes_each_pixel_from_a_random_place_further_down_and_right"),)),
    Bug("photons without the rest of their mean", AUGMENT,
        "found += v >= up_to", "found += 0",
        (augmented("poisson_numbers_follow_the_distribution_of_their_mean[0.0624]"),)),
    Bug("processes augment with seeds of their own", STAGES,
        "generator=own.fold(AUGMENTED))\n                y",
        "generator=own.fold(self.team.rank))\n                y",
        (stage("an_image_is_augmented_alike_by_any_number_of_processes"),)),
    Bug("gradients in the order of the processes", "utils/sga_team.py",
        "parts[k % team.size][k // team.size] for", "parts[k * team.size // len(works)]["
        "k % len(mine)] for", (shared(
            "each_process_does_its_work_and_all_get_all_results_in_order[5]"),)),
    Bug("labels of another process's images", "utils/sga_team.py",
        "blocks[rank::team.size])] = part", "blocks[::team.size])] = part",
        (shared("a_process_without_images_still_takes_part"),)),
    Bug("the last epoch for the best", STAGES,
        'if (plain + augmented) / 2 > self.best["score"]:', "if True:",
        (stage("the_network_of_the_best_epoch_is_saved"),)),
    Bug("gradients of several processes halved", STAGES,
        "self.mixed.backward(loss * (team.size / joint))", "self.mixed.backward(loss / joint)",
        (stage("two_processes_take_the_same_step_as_one"),)),
    Bug("tested on what was held out to choose", DATA,
        "if (test.root, test.names) != (train.root, train.names):", "if False:",
        (stage("a_network_is_tested_on_the_test_split_if_there_is_one"),)),
    Bug("accuracy under an augmentation of the plain image", CELLS,
        "count_right(model, z, y, 1", "count_right(model, x, y, 1",
        (network("the_accuracy_under_a_corruption_equals_that_of_a_plain_loop"),)),
    Bug("queries that are learnt away", HEADS,
        "q = self.norm_query(q + self.dropout(q))", "q = self.norm_query(q)",
        ("tests/test_heads.py::test_ml_decoder_equals_attention_written_naively",)),
    Bug("the attacker of eval_net.py does not know the defence", EVALUATED,
        "attack, adaptive(self.defended, s.draws), self", "attack, self.defended, self",
        (network("a_network_behind_gcm_is_attacked_by_the_adaptive_attacker"),)),
    Bug("measured without the defence", EVALUATED,
        "self.defended, images, draws", "self.model, images, draws",
        (network("a_network_is_measured_behind_its_defence_with_all_draws"),)),
    Bug("another step size than the table says", "eval_net.py",
        "alpha=eps / 4", "alpha=eps / 2",
        (network("the_cells_equal_those_of_the_attacks_called_one_by_one"),)),
    Bug("tested on images that were trained on", FINISHED,
        "return train.select(held), note", "return train, note",
        (network("a_network_of_train_gcm_is_tested_on_held_out_images"),)),
    Bug("a resumed loop forgets its random numbers", LOOP,
        "restore = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict",
        "restore = str if isinstance(part, torch.Generator) else part.load_state_dict",
        ("tests/test_loop.py::test_a_run_stopped_after_any_epoch_resumes_to_the_same_weights_and_rows",
         )),
    Bug("a resumed pass draws another order", LOOP,
        "            generator.set_state(inside[\"begun\"][name])\n", "            pass\n",
        ("tests/test_checkpoints.py::test_a_run_killed_after_any_checkpoint_takes_the_same_steps",)),
    Bug("a resumed pass goes on with the random numbers of its start", LOOP,
        "self.keep[name].set_state(state)", "pass",
        ("tests/test_checkpoints.py::test_a_run_killed_after_any_checkpoint_takes_the_same_steps",)),
    Bug("the loss of a resumed pass is that of its end", LOOP,
        "self.sums.copy_(self.inside[\"sums\"])", "pass",
        ("tests/test_checkpoints.py::test_a_run_killed_after_any_checkpoint_takes_the_same_steps",)),
    Bug("a resumed pass begins with its first minibatch", PASSES,
        "if len(part) >= smallest][skip:]", "if len(part) >= smallest]",
        ("tests/test_checkpoints.py::test_skipped_minibatches_draw_the_same_numbers_and_are_not_"
         "decoded",)),
    Bug("a loss that is not finite is saved", LOOP,
        "if not math.isfinite(loss) or broken:", "if False:",
        ("tests/test_loop.py::test_a_loss_that_is_not_finite_stops_before_the_checkpoint",)),
    Bug("outputs are drawn towards the clean ones", UNIVERSAL,
        "return -F.cosine_similarity", "return F.cosine_similarity",
        (uap(f"{COSINE}[None-False]"),)),
    Bug("lengths of the outputs count", UNIVERSAL,
        "-F.cosine_similarity(h, clean).mean()", "-(h * clean).sum(1).mean()",
        (uap(f"{COSINE}[4-False]"),)),
    Bug("the clean side sees the perturbed image", SGA,
        "            y = model(x)\n", "            y = model(cut(x + delta))\n",
        (uap(f"{COSINE}[None-True]"),)),
    Bug("the clean side has the gradient too", SGA,
        "with torch.no_grad(), universal.drawing(chance):", "with universal.drawing(chance):",
        (uap("the_clean_side_has_no_gradient"),)),
    Bug("outputs of other images once they are kept", UNIVERSAL,
        "else of_model[index] for of_model in y", "else of_model[:len(index)] for of_model in y",
        (uap("given_outputs_equal_those_that_would_be_computed"),)),
    Bug("clean outputs that are kept although every step warps its images", SGA,
        "if self.s.augment or self.random", "if self.random",
        (uap("two_epochs_of_a_comparing_loss_equal_those_of_the_naive_oracle[True]"),)),
    Bug("a random defence draws for the clean side alone", SGA,
        "    with universal.drawing(chance):\n        value",
        "    with universal.drawing(None):\n        value",
        (uap("behind_a_random_defence_both_sides_draw_the_same_and_each_step_draws_anew"),)),
    Bug("the members of an ensemble are compared with the first one's outputs", SGA,
        "in enumerate(zip(models, y, strict=True))]",
        "in enumerate(zip(models, y[:1] * len(models), strict=True))]",
        (uap("each_member_is_compared_with_its_own_outputs"),)),
    Bug("DM-UAP's weights stay where they were moved", MAXIMIN,
        "p.copy_(before)", "pass", (sure("the_network_is_restored_to_the_last_bit[off-False]"),)),
    Bug("DM-UAP's images move to where the network is least sure", MAXIMIN,
        "- radius / 8 *", "+ radius / 8 *", (sure(f"{PUBLISHED}[(7,)-0.02]"),)),
    Bug("DM-UAP's smoothing is left out", MAXIMIN,
        ", label_smoothing=SMOOTHING", "", (sure(f"{PUBLISHED}[(7,)-0.2]"),)),
    Bug("DM-UAP's radii do not grow", SGA,
        "share = (1 + len(self.rows)) / s.epochs", "share = 1.0",
        (sure("two_epochs_equal_those_of_the_naive_oracle_and_both_radii_grow"),)),
    Bug("the feature map of the classifier", UNIVERSAL,
        "_last_feature_map(calls[:begins], len(x))", "_last_feature_map(calls, len(x))",
        (uap("the_last_feature_map_of_torchvision_networks_is_found[squeezenet1_1]"),)),
    Bug("the map after pooling", UNIVERSAL,
        "AFTERWARDS = (*POOLING, nn", "AFTERWARDS = (nn",
        (uap("the_last_feature_map_of_torchvision_networks_is_found[alexnet]"),)),
    Bug("a preset wins over typed flags", "utils/sga_run.py",
        "for k, v in method.items() if getattr(args, k) is None", "for k, v in method.items()",
        (uap("a_preset_sets_the_flags_that_are_not_typed"),)),
]


def run_tests(folder, tests, log):
    """Fork and run pytest -x on the copy of src in `folder`. -> process id"""
    pid = os.fork()
    if pid:
        return pid
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["SRC_UNDER_TEST"] = folder
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]))


def allowed():
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(jobs, at_once):
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

    print(json.dumps(main(json.load(sys.stdin), min(8, allowed()))))
