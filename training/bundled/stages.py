"""The stages that make a small guide from nothing, one after the other: names and options of runs."""

STAGES = {
    "base": "--steps 22000 --learning-rate 0.005 --conversations 1250000 --share sum=24",
    # every answer told to its end and every token of the same weight: fewer loops
    "last": "--finish base --learning-rate 0.0014 --seed 1 --cut 0 --choice-weight 1 --share sum=20 --steps 1400 --conversations 66000",
    "head": "--head last --steps 170 --optimizer adamw --learning-rate 0.004 --conversations 12000 --seed 5 --cut 0 --choice-weight 5",
}  # fmt: skip
