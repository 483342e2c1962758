"""What follows the cut: fine-tuning with distillation, in memory or on a shared backbone."""
