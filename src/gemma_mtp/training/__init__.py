"""Training of the bundled pair: corpus, tokenizer, target, drafter and the files they become.

data, bpe                      text to token arrays
shapes, attention, optim       configurations and initial weights, attention over whole rows, optimiser and schedule
target_trainer                 the target, from scratch
rollout, losses, drafter_trainer   text the target writes, the unrolled loss, the drafter
bundle                         the bundle's files and model card
"""
