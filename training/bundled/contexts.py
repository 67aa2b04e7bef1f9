"""What people say around a question: where they met the thing, who wants to know, what they do.

A question is put together from a mention of the thing and a request that points at it, or from a
frame of ``frames.py`` between such remarks. None of this says which fact is asked for; the model
learns from it to listen to the rest.
"""

from __future__ import annotations

# {x}: the thing. A request follows, or comes first.
MENTIONS = [
    "(people|folks|they all|my colleagues|the experts) (always |often |keep |)(talk|talking|go on|write) about {x}",
    "(the|this|some|a) (docs|documentation|readme|manual|help text|blog post|article|video|lecture|slide) (mentions|mentioned|talks about|uses|describes) {x}",
    "{x} (came up|was mentioned|popped up|appeared) in a (meeting|talk|lecture|video|chat|book|blog|tweet|discussion|thread)",
    "there is (a thing called|something called|this idea of|a word for it:) {x}", "i (saw|found|met|noticed) {x} somewhere",
    "i (stumbled over|came across|ran into|tripped over|bumped into) {x}", "i am (reading|writing|learning|thinking|curious) about {x}",
    "i am (looking at|working with|working on|struggling with|stuck with|lost with) {x}", "i was told (about|to look at|to use) {x}",
    "my (prof|professor|boss|friend|brother|sister|teacher|colleague|student|team|manager) (mentioned|likes|praised|asked about|loves|talks of) {x}",
    "(everyone|everybody|somebody|someone|no one) (here |around me |)(uses|knows|mentions|explains|understands) {x}",
    "(the|this) (config|code|model card|paper|error|log|output|screen) says {x}", "we (use|discussed|need|had) {x} (at work|in class|yesterday|today)",
    "i (forgot|cannot remember|don't remember|never learned|always forget) {x}", "{x} (is new to me|confuses me|is a mystery|sounds odd|puzzles me|makes no sense to me)",
    "(my|the|an) (exam|homework|quiz|test|interview) (has|covers|asks about|is about|includes) {x}", "regarding {x}", "on the topic of {x}", "on {x}",
    "about {x}", "concept: {x}", "term: {x}", "topic: {x}", "so {x}", "{x} then", "okay {x}", "next up {x}", "(first|second|last) {x}",
    "i have to (explain|describe|teach|document|write about) {x} (to a child|to my mom|to my team|to students|soon|on monday)",
    "i read {x} but (did not follow|got lost|gave up|fell asleep)", "everything i (read|find) about {x} is (too long|too hard|full of math|confusing)",
    "for {x}", "with {x}", "take {x}", "imagine i had never heard of {x}", "let's (discuss|go over|look at|cover|do|start with) {x}",
    "a (newcomer|novice|layman|child|noob|student) (asks|wants to hear) about {x}", "you (said|wrote|mentioned) {x} (before|earlier|once)",
]  # fmt: skip
WHAT_REQUESTS = [
    "what is (it|that|this)", "what's (that|it|this)", "what does (it|that) mean", "explain( it| that| this|)( please|)", "tell me( what it is| about it| more|)",
    "what does (it|that) do", "how does (it|that) work", "(can|could|would) you explain( it| that|)", "describe it", "define it", "what are (they|those)",
    "a short explanation( please|)", "some (help|background|words|info)( please|)", "i need (a definition|an explanation|the basics|the idea|to know what it is)",
    "what should i know( about it|)", "what is the (idea|meaning|concept|gist|basic idea)", "give me the (idea|basics|gist|basic idea|short version)",
    "(help|enlighten me|teach me|educate me|fill me in)", "what do you know( about it|)", "what can you (say|tell me)( about it|)",
    "i don't (get|understand|know) (it|what it is)", "no (idea|clue) what (it|that) is", "(please |)make it (clear|simple|easy)", "i would like to understand it",
    "what is it (exactly|really|actually|again|all about)", "how would you put it", "say a (word|few words) on it", "spell it out", "break it down( for me|)",
]  # fmt: skip
WHY_REQUESTS = [
    "why( is it used| is it good| do we need it| would i want it| bother|)", "what is it (good|useful|used) for", "what is the (point|use|purpose|benefit|advantage|reason)( of it|)",
    "why does it matter", "is it (useful|important|needed|any good)( and why|)", "what does it (bring|buy|give) (us|me)", "what problem does it solve",
    "why do (people|they|models) use it", "why should i (use it|care|bother)", "what would (happen|go wrong|be lost) without it", "does it help( and how|)",
    "what are the (benefits|advantages|upsides|merits)", "what makes it (good|useful|important|better)", "what is so (good|great|special) about it",
    "tell me why( it is used| it matters|)", "what good is it", "explain (the benefit|the point|the use|why it is used)", "is it a good idea( and why|)",
]  # fmt: skip
# {g}: the wish
WISHES = [
    "i (want|need|wish|have|would like|would love|plan|hope|intend|try|am going|am about|decided) to {g}", "we (want|need|have|would like|plan) to {g}",
    "my (boss|friend|colleague|teacher|user|team) (wants|needs|has|asked me|told me) to {g}", "(today|tomorrow|now|next|later|tonight) i (want|have|need) to {g}",
    "i have no idea how to {g}", "i forgot how to {g}", "i cannot {g}", "i can't {g}", "i could not {g} so far", "i failed to {g}", "i still have to {g}",
    "it is time to {g}", "let's {g}", "time to {g}", "in order to {g}", "to {g}", "how to {g}", "task: {g}", "todo: {g}", "help me {g}", "{g}", "{g} with mlxtx",
    "i am (unable|not able|trying hard|ready|eager|in need) to {g}", "i never managed to {g}", "it would be (nice|great|good|cool|useful) to {g}", "if i (want|need|wish) to {g}",
    "(first|then|after that|at last) i (want|need) to {g}", "the plan: {g}", "someone asked how to {g}", "is there any chance to {g}", "when i want to {g}",
]  # fmt: skip
HOW_REQUESTS = [
    "what (do|should|must|can) i (do|type|run|use|press|enter|write)", "how( do i do that| does that work| is it done| can i do it| do i start|)", "what is the (command|way|trick|option|key|syntax)",
    "(show|tell|teach) me( how| the way| the command| what to do|)", "is (that|it|this) possible", "can (mlxtx|you|i|it) do (that|it|this)", "is there a (command|way|key|flag|option|shortcut)( for it| for that|)",
    "(please |)(help|help me|advise|assist)( please|)", "which (command|option|key|flag) (is it|do i need|do i use|does it|helps)", "how exactly", "what now", "what is needed( for that|)",
    "does mlxtx (support|have|offer|allow) (it|that)", "where do i (start|begin|find that|click)", "i need (help|the command|instructions|a hint|guidance)", "any (idea|hint|tip|suggestion|help)( for me|)",
    "what would you (do|suggest|recommend)", "what are the steps", "give me (the command|a hint|instructions|an example)", "i am (stuck|lost|clueless)", "explain( it| how| please|)",
]  # fmt: skip
PAIR_MENTIONS = [
    "i (always |often |sometimes |keep |)(confuse|confusing|mistake|mixing) {a} (with|and|for) {b}", "{a} and {b}", "{a}, {b}", "{a} / {b}", "there is {a} and there is {b}",
    "i cannot decide between {a} and {b}", "i (know|heard of|read about) {a} and {b}", "people (use|mention|compare) {a} and {b}", "{a} on one side, {b} on the other",
    "{a} (looks|sounds|seems) (just |)like {b}", "some (use|say|take) {a}, others {b}", "i have to choose: {a} or {b}", "we discussed {a} and also {b}",
]  # fmt: skip
PAIR_REQUESTS = [
    "(what is|what's|where is|tell me|explain|show me) the difference", "how do they (differ|compare)", "which (one |)(is better|should i use|do i want)", "compare them", "are they the same( thing|)",
    "how are they different", "what (separates|distinguishes) them", "which is which", "help me (choose|decide|tell them apart)", "what is different", "who wins", "how does one differ from the other",
]  # fmt: skip
# remarks before and after any question
BEFORE = [
    "i am new (here|to this|to all this)", "i am (a beginner|a student|a developer|just curious|not an expert|confused|in a hurry)", "sorry to bother you", "maybe a stupid question", "(just |)curious",
    "this may be (silly|easy|a dumb question)", "i (just |)(installed mlxtx|bought a mac|got started|opened the app)", "for a (talk|project|friend|class|course|paper)", "asking for a friend",
    "you seem to know a lot", "i hope you can help", "if you do not mind", "before i forget", "(ok|right|alright|fine|good|great)", "(thanks|thank you) so far", "by the way", "btw", "hm", "hmm", "um", "uh", "yo", "hey guide",
    "hello there", "good morning", "dear guide", "assistant", "next question", "another one", "one more thing", "last question", "back to work", "let me ask", "may i ask", "i have been wondering", "it is late but", "serious question",
]  # fmt: skip
AFTER = [
    "please", "pls", "plz", "thanks", "thank you", "thx", "if you can", "if possible", "in short", "in one sentence", "in simple words", "briefly", "i am new to this", "i need it for work", "i am curious", "for a friend",
    "i have an exam", "asap", "quickly", "right now", "today", "in mlxtx", "on my mac", "on apple silicon", "in general", "again", "exactly", "really", "by the way", "ok", "anyway", "when you have time", "be honest", "for my notes",
    "i could not find it", "nobody could tell me", "google did not help", "the docs are long", "that would help", "i would be glad", "it matters to me", "i keep forgetting", "just the basics", "i am listening", "and why not",
]  # fmt: skip
JOINTS = [", ", ", ", ". ", ". ", "; ", ": ", " - ", " ", "... ", " and "]
# bare words: "{x}?" and such, as in a search box
BARE = ["{x}", "{x}", "{x}??", "{x} ?", "{x} pls", "{x} please", "{x} help", "{x} definition", "{x} info", "{x} basics", "{x} eli5", "wtf is {x}", "whats {x}", "what {x}", "what is {x}", "wat is {x}", "explain {x} pls", "{x} short"]  # fmt: skip

# words that may stand for each other in a wish or in a name's surroundings
SYNONYMS = """
model network llm checkpoint
show display view see print
make create produce build
get obtain receive fetch
chat conversation dialog
answer reply response output
use employ apply take
see view watch check
find locate discover spot
choose pick select decide
check inspect examine verify test
smaller tinier lighter
save store keep write
stop halt end abort cancel
fix solve repair cure
speed pace tempo
load open read import
file document
folder directory path
big large huge
bigger larger stronger
fast quick rapid
change modify switch alter
set define configure specify
list enumerate show
machine computer mac laptop
memory ram
data samples examples
write type compose
"""
