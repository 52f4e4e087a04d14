"""Settings that make a method small enough for a test, or expose more of its state between rounds."""

CALIBRATED = {"calibrate": True, "virtual_features": 20, "calibration_epochs": 1}
DISTILLED = {"distill_batch": 4, "distill_epochs": 2, **CALIBRATED}
GENERATED = {"nz": 4, "ngf": 2, "generator_steps": 2, "synthesis_batch": 8, **DISTILLED}
SETTINGS = {
    "ccvr": {"options": CALIBRATED},
    "dense": {"options": GENERATED},
    "ensemble": {"options": {"models": "cnn:2,resnet8:2", **CALIBRATED}},
    "feddf": {"options": DISTILLED},
    "feddra": {
        "width": 4,
        "local_steps": 2,
        "optimizer": "adamw",
        "lr": 1e-3,
        "buffers": "pool",
        "options": {"alignment_steps": 1},
    },
    "fedgid": {"options": {"alpha": 0.5}},
    "fediod": {"options": {"ngf": 2, "ndf": 2, "batch": 8, "student_steps": 2, "iterations": 0}},
    "fedproto": {"options": {"networks": "personal"}},
    "fedcgs": {"local_epochs": None, "batch_size": None},  # its clients train nothing
    "fusefl": {"local_epochs": 4, "options": {"blocks": 3, "frozen_bn": "code"}},
    "moon": {"local_epochs": 2},
    "scaffold": {"options": {"control": "I"}},
}
