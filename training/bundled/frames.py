"""The ways to ask. {x} is the thing, {g} a wish ("quantize a model"), {a} and {b} two things.

No frame stands in both TRAIN and HELD: the held-out questions are asked in ways the model has
never seen. A test checks this, and that no held-out question occurs in the training data.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

MORE: dict[str, list[str]] = tomllib.loads(
    (Path(__file__).parent / "facts" / "frames.toml").read_text()
)
OPENERS = [
    "", "", "", "", "", "", "please, ", "hey, ", "hi, ", "ok, ", "so, ", "and ", "well, ", "hello, ",
    "sorry, ", "question: ", "one question: ", "quick question, ", "i wonder, ", "say, ", "now, ",
]  # fmt: skip
CLOSERS = [
    "", "", "", "", "", "", "", " please", ", please", " thanks", " in mlxtx", " here", " again",
]  # fmt: skip

WHAT = [
    "what is {x}", "what is {x}", "what's {x}", "what are {x}", "explain {x}", "explain {x} to me",
    "(can|could|would) you explain {x}", "tell me (about|something about|more about) {x}",
    "what does {x} mean", "what do {x} do", "what does {x} do", "define {x}", "describe {x}",
    "what do you know about {x}", "how does {x} work", "how do {x} work", "what is meant by {x}",
    "i want to (know|learn|understand) what {x} is", "i want to (understand|learn about) {x}",
    "please explain (what {x} is|{x})", "{x}", "{x} meaning", "{x} explained", "meaning of {x}",
    "(could|can|would|will) you (tell me|say) what {x} is", "teach me (about |){x}",
    "(help me understand|i do not understand|i don't get|i do not know) {x}",
    "what is the (meaning|definition|idea) of {x}", "what is the idea behind {x}",
    "explain {x} (simply|like i am five|in one sentence|briefly|in simple words)",
    "do you know (what {x} is|{x}|about {x})", "what exactly is {x}", "what is this {x} thing",
    "i have (heard|read) (of|about) {x}, what is (it|that)", "give me (a definition|an explanation) of {x}",
    "i (have|got) a question about {x}", "what can you (tell me|say) about {x}",
    "(a word|something|a few words) about {x}", "is {x} important, and what is it",
    "what is {x} in a (decoder|transformer|language model|neural network)", "{x} in a decoder",
    "how would you (define|describe|explain) {x}", "who or what is {x}", "talk about {x}",
    "my (boss|friend|teacher) asked me what {x} is", "i (never|did not) understood what {x} is",
    "let us talk about {x}", "can we talk about {x}", "when i read about {x}, what is that",
    *MORE["what"],
]  # fmt: skip
WHAT_HELD = [
    "walk me through {x}", "i keep seeing {x} in papers; clarify it for me",
    "remind me, {x} refers to what", "in plain language, {x} stands for",
    "what should a beginner learn concerning {x}", "i'm confused by {x}, clear it up",
    "got a short summary of {x}", "suppose i had to present {x} tomorrow; how would it go",
]  # fmt: skip

WHY = [
    "why do we (need|use|have) {x}", "why use {x}", "why is {x} (used|useful|important|needed|good)",
    "what is {x} (good|used|useful) for", "what is the (use|purpose|benefit|advantage|point) of {x}",
    "what problem does {x} solve", "why does {x} matter", "why should i (care about|use) {x}",
    "why {x}", "is {x} (useful|important|needed)", "(explain|tell me) why {x} is (used|useful|important)",
    "what are the (benefits|advantages) of {x}", "do (we|i) need {x}",
    "why do (people|models|decoders) (use|have) {x}", "what is so good about {x}",
    *MORE["why"],
]  # fmt: skip
WHY_HELD = [
    "which gain does one get out of {x}", "for what reason would anybody want {x}",
    "convince me that {x} is worth it",
]  # fmt: skip

HOW = [
    "how do i {g}", "how do i {g}", "how can i {g}", "how to {g}", "i want to {g}", "i'd like to {g}",
    "i would like to {g}", "i need to {g}", "what is the command to {g}", "how does one {g}",
    "(which|what) command (lets me|do i use to|can i use to|do i need to) {g}", "help me {g}",
    "can i {g}", "can (you|mlxtx) {g}", "is it possible to {g}", "(show|tell) me how to {g}",
    "what do i (type|run|enter|press|do) to {g}", "{g}", "what (should|must) i do to {g}",
    "is there a (way|command|key) to {g}", "please {g}", "how would i {g}", "explain how to {g}",
    "i do not know how to {g}", "(could|can) you (tell|show) me how to {g}", "how should i {g}",
    "what is the (best |easiest |)way to {g}", "does mlxtx let me {g}", "am i able to {g}",
    "what if i want to {g}", "i tried to {g} but do not know how", "where can i {g}",
    "i want to {g}, how (do i do that|does it work)", "let me {g}", "we want to {g}", "how do we {g}",
    *MORE["how"],
]  # fmt: skip
HOW_HELD = [
    "i'm trying to {g}, any pointers", "my goal is to {g}; which step comes next",
    "got to {g} today, advice needed", "suppose somebody wishes to {g}; what then",
    "what would it take for me to {g}", "looking for the proper method to {g}",
]  # fmt: skip

COMMAND = [
    "what does mlxtx {x} do", "what is mlxtx {x}( for|)", "explain (the {x} command|mlxtx {x})",
    "when do i (use|need|run) mlxtx {x}", "tell me about (mlxtx {x}|the {x} command)",
    "what is the {x} command( for|)", "what does the {x} command do", "mlxtx {x}",
    "what happens when i run mlxtx {x}", "describe (mlxtx {x}|the {x} command)",
    "why (would|should) i (use|run) mlxtx {x}", "what can i do with mlxtx {x}",
    "how does mlxtx {x} work", "what is {x} in mlxtx", "do i need mlxtx {x}",
    "(help with|help for|more about|use of) mlxtx {x}",
    *MORE["command"],
]  # fmt: skip
COMMAND_HELD = [
    "i saw mlxtx {x} in the list; kindly clarify", "is running mlxtx {x} worthwhile, and to what end",
    "the purpose of the mlxtx {x} subcommand",
]  # fmt: skip

PRESS = [
    "what does {x} do", "what is {x}( for|)", "what happens when i (press|type|use) {x}",
    "explain {x}", "tell me (about|what) {x}( does|)", "when do i use {x}", "{x}", "why {x}",
    "what can i do with {x}", "how do i use {x}", "what is the use of {x}", "describe {x}",
    "what if i (press|type|use) {x}", "i (pressed|typed) {x}, what (happens|now)",
    *MORE["press"],
]  # fmt: skip
PRESS_HELD = ["the effect of {x}, please", "somebody mentioned {x}; its role"]

PAIR = [
    "what is the difference between {a} and {b}", "what's the difference between {a} and {b}",
    "(the |)difference (between|of) {a} and {b}", "{a} or {b}", "{a} vs {b}", "{a} versus {b}",
    "compare {a} (and|with|to) {b}", "how (does|do|is) {a} (differ|different) from {b}",
    "which is better, {a} or {b}", "should i use {a} or {b}", "is {a} (better than|the same as|like) {b}",
    "explain the difference between {a} and {b}", "how do {a} and {b} differ", "why {a} and not {b}",
    "(can|could) you compare {a} (and|with) {b}", "{a} compared (to|with) {b}", "are {a} and {b} the same",
    "when (do|should) i use {a} and when {b}", "tell me the difference between {a} and {b}",
    "what distinguishes {a} from {b}", "{a} and {b}, what is the difference",
    *MORE["pair"],
]  # fmt: skip
PAIR_HELD = [
    "set {a} apart from {b} for me", "i mix up {a} and {b} all the time",
    "in which respect are {a} and {b} unlike",
]  # fmt: skip

# behind an answer: what about this other thing
FOLLOW = [
    "and {x}", "what about {x}", "and what about {x}", "how about {x}", "and what is {x}", "now {x}",
    "ok, and {x}", "then what is {x}", "and how about {x}", "next: {x}", "also {x}", "tell me about {x} too",
    *MORE["follow"],
]  # fmt: skip
FOLLOW_HELD = ["moving on to {x}", "as for {x}"]
# behind an answer about a thing: what is it good for
FOLLOW_WHY = [
    "why", "why is (that|it|this) (useful|good|important|needed)", "what is it good for", "why do we need (it|that|this)",
    "what is the (point|use|benefit|advantage)( of that| of it|)", "why does (it|that) matter", "why would i want (that|it)",
    "and why", "why is that", "what is that (good|used) for", "why should i care", "is (that|it) important",
    *MORE["follow_why"],
]  # fmt: skip
FOLLOW_WHY_HELD = ["and for what reason do people want it", "which benefit does that bring"]
FOLLOW_SHORT = [
    "shorter( please|)", "(say it|say that|tell me that) in (short|fewer words|a few words)", "in short",
    "make it shorter", "too long", "that is too long", "briefly( please|)", "short version( please|)", "can you say it shorter",
    "summarize( that|)", "in a few words( please|)", "sum it up", "simpler( please|)",
    *MORE["follow_short"],
]  # fmt: skip
FOLLOW_SHORT_HELD = ["condense this", "fewer words next time, try now"]
FOLLOW_REPEAT = [
    "(say|tell me) (that|it) again", "repeat( that| it| please|)", "again( please|)", "what did you say", "pardon, what was that",
    "once more( please|)", "i did not (get|read|catch) that", "can you repeat( that| it|)",
    *MORE["follow_repeat"],
]  # fmt: skip
FOLLOW_REPEAT_HELD = ["one more time for me"]
RECALL = [
    "what did i (ask|want to know)( before| first| just now| last|)", "what was my (last|previous|first) question",
    "what did i just ask( you|)", "what were we talking about", "what was the topic", "do you remember what i asked( you|)",
    "what have i asked( you|)", "what did we talk about", "what was my question", "which question did i ask",
    *MORE["recall"],
]  # fmt: skip
RECALL_HELD = ["remind me of my earlier question"]
