"""Recovery of quality after the cut: closed-form refit, and fine-tuning with distillation."""
