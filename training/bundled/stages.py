"""The stages that make a small guide from nothing, one after the other: names and options of runs."""

STAGES = {
    "base": "--steps 22000 --learning-rate 0.005 --conversations 1250000 --share sum=24",
    "more": "--finish base --learning-rate 0.003 --seed 1 --steps 10000 --conversations 560000",
    # every answer told to its end and every token of the same weight
    "last": "--finish more --learning-rate 0.0005 --seed 3 --cut 0 --choice-weight 1 --share sum=20 --steps 600 --conversations 30000",
    "mean": "--mean more last last",
    "head": "--head mean --steps 170 --optimizer adamw --learning-rate 0.004 --conversations 12000 --seed 5 --cut 0 --choice-weight 5",
}  # fmt: skip
