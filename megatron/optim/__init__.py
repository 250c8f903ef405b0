"""What moves the weights: learning-rate schedules and the groups parameters are optimised in.

    ScheduleSettings ──> LearningRateSchedule.at(count)        pure arithmetic, no torch
                    └──> LearningRateScheduler(optimizer, …)   writes it into the optimizer
    weight_decay_groups(module, …)                             which parameters decay

The count is the number of optimizer steps taken so far: step N is trained with ``at(N - 1)``.
"""
