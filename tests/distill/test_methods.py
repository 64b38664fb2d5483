"""Every way to distil against a computation of its own from the paper's equations, on fixed tensors."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model, tiny_vit

from pipeline.config import resolve_config
from pipeline.distill.run import student_terms
from pipeline.distill.step import Batch, Objective, Terms, training_step

B, T, N = 2, 3, 3
ALPHA, BETA, TEMPERATURE = 0.5, 0.3, 0.2


def build_teacher(slot_size=8):
    """Wider features on a finer grid than the student's."""
    model = tiny_model(N, slot_size, seed=1, image_size=48, vit=tiny_vit(48), hidden=(16, 16))
    return model.requires_grad_(False).eval()


@pytest.fixture
def student():
    return tiny_model(N, vit=tiny_vit(32), hidden=(16, 16)).train()


@pytest.fixture
def teacher():
    return build_teacher()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    shapes = {"video": (3, 32, 32), "target_slots": (N, 8), "teacher_features": (36, 48)}
    return Batch(**{name: torch.randn(B, T, *shape, generator=generator) for name, shape in shapes.items()})


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def mean_over_slots(student_BTND, teacher_BTND, distance):
    pairs = zip(student_BTND.flatten(0, 2), teacher_BTND.flatten(0, 2), strict=True)
    values = [distance(student, teacher) for student, teacher in pairs]
    return sum(values) / len(values)


def eq_2(student_BTND, teacher_BTND):
    return mean_over_slots(student_BTND, teacher_BTND, lambda s, t: 1 - cosine(s, t))


def best_order(student_ND, teacher_ND):
    """Of all orders of the teacher's slots the one that is most alike, by trying every one."""
    return max(
        itertools.permutations(range(N)),
        key=lambda order: sum(cosine(student_ND[n], teacher_ND[m]) for n, m in enumerate(order)),
    )


def contrast(slots_BTND):
    """Slot-slot contrast: each slot of frame t + 1 finds itself among all slots of frame t."""
    total, count = 0.0, 0
    for t in range(T - 1):
        before, after = (slots_BTND[:, i].flatten(0, 1) for i in (t, t + 1))
        for j, slot in enumerate(after):
            logits = torch.tensor([cosine(other, slot) / TEMPERATURE for other in before])
            total, count = total + float(logits.logsumexp(0) - logits[j]), count + 1
    return total / count


def expected_terms(method, objective, teacher, batch):
    with torch.no_grad():
        output = objective.model(batch.video)
        slots, target = output.slots, batch.target_slots
        rec = float(((output.reconstruction - output.backbone_features) ** 2).mean())
        values = {"reconstruction": (rec, 1.0), "contrast": (contrast(slots), ALPHA)}
        if method in ("slotmatch", "slotmatch_reconstruction_kd"):
            values["slot_kd"] = (eq_2(slots, target), BETA)
        if method == "slotmatch_mse":
            values["slot_kd"] = (float(((slots - target) ** 2).mean()), BETA)
        if method.startswith("slotmatch_hungarian"):
            matched = torch.empty_like(target)
            for b, t in itertools.product(range(B), range(T)):
                place = (b, 0) if method.endswith("clip") else (b, t)
                matched[b, t] = target[b, t, list(best_order(slots[place], target[place]))]
            values["slot_kd"] = (eq_2(slots, matched), BETA)
        if method.endswith("reconstruction_kd"):
            decoded = [teacher.decode(s)[0] for s in (slots, target)]  # Eq. 5: f of both
            values["reconstruction_kd"] = (float(((decoded[0] - decoded[1]) ** 2).mean()), 0.7)
        if method == "feature_kd":
            projected = objective.model.encoder.output_transform(output.backbone_features)
            predicted = objective.heads["features"](projected)  # (B, T, 4 * 4, 48)
            grid = predicted.flatten(0, 1).transpose(1, 2).unflatten(2, (4, 4))
            resized = torch.nn.functional.interpolate(grid, (6, 6), mode="bilinear").flatten(2)
            distance = resized.transpose(1, 2).unflatten(0, (B, T)) - batch.teacher_features
            values["feature_kd"] = (float((distance**2).mean()), 0.6)
    return values


METHODS = {
    "no_kd": Terms(),
    "slotmatch": Terms(slot_kd=BETA),
    "slotmatch_mse": Terms(slot_kd=BETA, slot_loss="mse"),
    "slotmatch_hungarian_clip": Terms(slot_kd=BETA, slot_loss="hungarian_clip"),
    "slotmatch_hungarian_frame": Terms(slot_kd=BETA, slot_loss="hungarian_frame"),
    "reconstruction_kd": Terms(reconstruction_kd=0.7),
    "slotmatch_reconstruction_kd": Terms(slot_kd=BETA, reconstruction_kd=0.7),
    "feature_kd": Terms(feature_kd=0.6),
}


def make(method, student, teacher):
    wanted = replace(METHODS[method], alpha=ALPHA, temperature=TEMPERATURE)
    torch.manual_seed(3)
    return Objective(student, wanted, teacher=teacher if method != "no_kd" else None)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_the_papers_equations(method, student, teacher, batch):
    objective = make(method, student, teacher)
    losses = objective(batch)
    expected = expected_terms(method, objective, teacher, batch)
    assert set(losses) == {"total", *expected}
    for name, (value, _) in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    total = sum(weight * value for value, weight in expected.values())
    assert losses["total"].item() == pytest.approx(total, rel=1e-4)


SLOT_PATH = ("initializer.", "encoder.output_transform.", "processor.corrector.", "processor.predictor.")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "no_kd"])
def test_the_gradient_of_distillation_reaches_what_it_trains(method, student, teacher, batch):
    """Slots learn from slots and from what the teacher's decoder makes of them, projections from features;
    the student's own decoder, its frozen backbone and the teacher from none."""
    objective = make(method, student, teacher)
    losses = objective(batch)
    sum(losses[name] for name in losses if name.endswith("_kd")).backward()
    reached = {n for n, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    path = ("encoder.output_transform.",) if method == "feature_kd" else SLOT_PATH
    assert reached
    assert all(name.startswith(path) for name in reached)
    for prefix in path:
        assert any(name.startswith(prefix) for name in reached), prefix
    assert all(p.grad is None for p in teacher.parameters())
    assert all(bool(p.grad.any()) for p in objective.heads.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_its_targets(method, student, teacher, batch):
    curve = train(make(method, student, teacher), 60, lambda: batch)
    for name in curve[0]:
        if name in ("total", "reconstruction") or name.endswith("_kd"):
            assert curve[-1][name] < 0.95 * curve[0][name], name


def train(objective, steps, next_batch):
    optimizer = torch.optim.Adam(objective.trainable_parameters())
    settings = {"learning_rate": 3e-3, "gradient_clip": 1.0}
    return [training_step(objective, optimizer, next_batch(), **settings) for _ in range(steps)]


def test_slots_of_another_size_are_compared_through_a_learned_map(student, batch):
    teacher = build_teacher(12)
    wide = Batch(video=batch.video, target_slots=torch.randn(B, T, N, 12))
    with pytest.raises(ValueError, match="differ"):
        Objective(student, Terms(slot_kd=BETA), teacher=teacher)(wide)
    objective = Objective(student, Terms(slot_kd=BETA, slot_map=True), teacher=teacher)
    losses = objective(wide)
    with torch.no_grad():
        mapped = student(batch.video).slots @ objective.heads["slot_map"].weight.T
    assert losses["slot_kd"].item() == pytest.approx(eq_2(mapped, wide.target_slots), rel=1e-4)
    losses["slot_kd"].backward()
    assert objective.heads["slot_map"].weight.grad.any()
    assert not any("slot_map" in name for name in student.state_dict())


def test_theorem_1_holds_for_the_teachers_decoder(student, teacher, batch):
    objective = make("slotmatch", student, teacher)
    measured = objective.measure_bound(batch)
    with torch.no_grad():
        slots = student(batch.video).slots
        decoded = [teacher.decode(s)[0] for s in (slots, batch.target_slots)]
    distance = float(((decoded[0] - decoded[1]) ** 2).sum((-1, -2)).mean())
    assert measured["theorem1_measured"] == pytest.approx(distance, rel=1e-4)
    assert measured["theorem1_cosine_distance"] == pytest.approx(eq_2(slots, batch.target_slots), rel=1e-4)
    assert measured["theorem1_bound_any_norm"] >= measured["theorem1_measured"]
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("wanted", "batch_without", "message"),
    [
        (Terms(slot_kd=1), "target_slots", "needs the teacher's slots"),
        (Terms(reconstruction_kd=1), "target_slots", "needs the teacher's slots"),
        (Terms(feature_kd=1), "teacher_features", "needs the teacher's features"),
    ],
)
def test_targets_that_are_not_there_are_named(student, teacher, batch, wanted, batch_without, message):
    with pytest.raises(ValueError, match=message):
        Objective(student, wanted, teacher=teacher)(replace(batch, **{batch_without: None}))


def test_terms_that_can_not_be_are_refused(student):
    with pytest.raises(ValueError, match="need the teacher itself"):
        Objective(student, Terms(reconstruction_kd=1))
    with pytest.raises(ValueError, match="predicts no similarities"):
        Objective(student, Terms(similarity=0.1))
    with pytest.raises(ValueError, match="slot_loss must be one of"):
        Objective(student, Terms(slot_loss="l1"))


def test_every_method_of_the_config_has_its_terms():
    def of(method, **settings):
        values = {"method": method, "beta": 0.4, **settings}
        features = {"teacher_features": True}
        return student_terms(resolve_config({"distill": values, "targets": features}).distill)

    assert of("no_kd") == Terms()
    assert of("slotmatch") == Terms(slot_kd=0.4)
    assert of("slotmatch_mse") == Terms(slot_kd=0.4, slot_loss="mse")
    assert of("slotmatch_hungarian") == Terms(slot_kd=0.4, slot_loss="hungarian_clip")
    assert of("slotmatch_hungarian", matching="frame") == Terms(slot_kd=0.4, slot_loss="hungarian_frame")
    assert of("reconstruction_kd") == Terms(reconstruction_kd=1.0)
    both = of("slotmatch_reconstruction_kd", reconstruction_kd_weight=0.5)
    assert both == Terms(slot_kd=0.4, reconstruction_kd=0.5)
    assert of("feature_kd", feature_kd_weight=2) == Terms(feature_kd=2.0)
    assert of("slotmatch", slot_map=True) == Terms(slot_kd=0.4, slot_map=True)


# --- VideoSAUR's objective ----------------------------------------------------------------------------


def videosaur(outputs=("features", "similarity")):
    design = {"corrector_mlp": False, "decoder": "slot_mixer", "decoder_blocks": 1, "initializer": "random"}
    sizes = {"vit": tiny_vit(32), "hidden": (16, 16)}
    model = tiny_model(N, seed=4, decoder_outputs=outputs, **sizes, **design)
    return model.train()


def last_keys(model, video_BTCHW):
    """The keys of the last block, from its own layers."""
    vit = model.encoder.backbone.model
    x = vit.patch_embed(video_BTCHW.flatten(0, 1))
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    size = x.shape[-1]
    keys = last.norm1(x) @ last.attn.qkv.weight[size : 2 * size].T + last.attn.qkv.bias[size : 2 * size]
    return keys[:, 1:].unflatten(0, video_BTCHW.shape[:2])


def test_similarity_is_that_of_the_backbones_keys(batch):
    model = videosaur()
    terms_ = Terms(alpha=0, similarity=0.1, similarity_temperature=0.25)
    initial = model.initial_slots(B, [1, 2]).detach()
    losses = Objective(model, terms_)(Batch(video=batch.video, initial_slots=initial))
    assert set(losses) == {"total", "reconstruction", "similarity"}
    with torch.no_grad():
        keys = torch.nn.functional.normalize(last_keys(model, batch.video), dim=-1)
        logits = model(batch.video, initial_slots=initial).similarity
        values = []
        for b, t, p in itertools.product(range(B), range(T - 1), range(16)):
            cosines = keys[b, t + 1] @ keys[b, t, p]
            target = torch.where(cosines < 0, -torch.inf, cosines / 0.25).softmax(0)
            values.append(float(-(target * logits[b, t, p].log_softmax(0)).sum()))
    assert losses["similarity"].item() == pytest.approx(sum(values) / len(values), rel=1e-4)
    expected = losses["reconstruction"] + 0.1 * losses["similarity"]
    assert losses["total"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_for_similarity_alone_learns_it(batch):
    model = videosaur(outputs=("similarity",))
    objective = Objective(model, Terms(reconstruction=0, alpha=0, similarity=1.0))
    curve = train(objective, 40, lambda: replace(batch, initial_slots=model.initial_slots(B, [1, 2])))
    assert set(curve[0]) == {"total", "similarity", "gradient_norm"}
    assert curve[-1]["similarity"] < 0.95 * curve[0]["similarity"]
    with pytest.raises(ValueError, match="reconstructs no features"):
        Objective(model, Terms(alpha=0, similarity=1.0))
    with pytest.raises(ValueError, match="nothing to train for"):
        Objective(model, Terms(reconstruction=0, alpha=0))
    with pytest.raises(ValueError, match="needs the video"):
        objective(Batch(backbone_features=torch.zeros(B, T, 16, 32)))
