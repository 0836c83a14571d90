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
