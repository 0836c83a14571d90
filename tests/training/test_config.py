"""The defaults are the paper's."""

from pixeldecoder.training.config import RECIPES, Optimizer, Prior, Student, Teacher


def test_the_paper_s_settings():
    prior, teacher, student = (RECIPES[stage]["paper"]() for stage in ("prior", "teacher", "student"))
    assert isinstance(prior, Prior) and isinstance(teacher, Teacher) and isinstance(student, Student)
    table = {
        stage: (run.optimizer.learning_rate, run.batch_size, run.steps, run.optimizer.warmup_steps)
        for stage, run in (("prior", prior), ("teacher", teacher), ("student", student))
    }
    assert table == {
        "prior": (2e-5, 128, 20_000, 2000),
        "teacher": (5e-5, 64, 30_000, 2000),
        "student": (1e-5, 16, 3000, 100),
    }
    assert [run.optimizer.weight_decay for run in (prior, teacher, student)] == [1e-3, 1e-3, 0]
    assert student.fake_score_optimizer == Optimizer(learning_rate=1e-5, weight_decay=1e-3, warmup_steps=0)
    assert student.discriminator_optimizer == Optimizer(
        learning_rate=1e-5, weight_decay=0.0, warmup_steps=0, max_grad_norm=None
    )
    for run in (prior, teacher, student):
        assert run.optimizer.betas == (0.9, 0.999) and run.optimizer.max_grad_norm == 0.1
        assert run.precision == "bfloat16" and run.data.resolution == 2048
    for run in (teacher, student):
        assert (run.noise_probability, run.max_sigma) == (0.75, 0.8)
    assert (prior.caption_dropout, prior.repa_weight, prior.repa_block) == (0.1, 0.5, 6)
    assert (teacher.caption_dropout, teacher.latent_dropout) == (0.1, 0.1)
    assert (teacher.train, teacher.aux_rgb_weight) == ("adapter", 0.8)
    assert (student.student_every, student.guidance_scale, student.student_input) == (6, 3, "noised")
    assert (student.gan_weight, student.gan_warmup_steps) == (0.05, 100)
    assert (student.r1_weight, student.r1_noise, student.feature_blocks) == (200, 0.1, (7,))
    assert student.negative_prompt == ""


def test_the_settings_of_no_paper():
    for run in (Prior(), Teacher(), Student()):
        assert (run.ema_decay, run.micro_batch_size, run.seed, run.lora.rank) == (0.9999, 1, 0, 0)
        assert (run.log_every, run.validate_every, run.checkpoint_every, run.keep_checkpoints) == (10, 1000, 500, 2)
        assert run.gradient_checkpointing and not run.compile and not run.fsdp and run.tracker == "tensorboard"
        assert (run.data.max_aspect_ratio, run.data.in_memory, run.data.workers) == (2, False, 4)
    assert Student().teacher_memory == "full" and Prior().repa_weight == 0


def test_nano_s_settings():
    teacher, student = RECIPES["teacher"]["nano"](), RECIPES["student"]["nano"]()
    for run in (teacher, student):
        assert (run.data.resolution, run.data.in_memory, run.encoder) == (512, True, "nano")
        assert run.micro_batch_size == run.batch_size and not run.gradient_checkpointing
    assert (teacher.train, teacher.batch_size, teacher.ema_decay, teacher.steps) == ("all", 32, 0.999, 30_000)
    assert teacher.optimizer == Optimizer(learning_rate=5e-4, warmup_steps=200, max_grad_norm=1.0)
    assert (student.batch_size, student.ema_decay, student.feature_blocks, student.steps) == (16, 0.95, (1,), 3000)
    common = dict(learning_rate=5e-5)
    assert student.optimizer == Optimizer(**common, weight_decay=0.0, warmup_steps=100, max_grad_norm=1.0)
    assert student.fake_score_optimizer == Optimizer(**common, weight_decay=1e-3, warmup_steps=0, max_grad_norm=1.0)
    assert student.discriminator_optimizer == Optimizer(**common, weight_decay=0.0, warmup_steps=0, max_grad_norm=None)
