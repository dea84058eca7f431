"""Makes bundles: image sets, augmentation, objectives, the training loop, calibration, evaluation and export."""
