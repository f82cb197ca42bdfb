"""`davsp reproduce deep-alignment`: is a border that was supervised in the activations deeper than one supervised by answers alone?

The paper says so (its Table 4 and the words "shallow alignment"). Three borders differ in the objective (the hinge on the
projection, the cross-entropy of answers, or both), and by the usual settings in the share of malicious rows with a refusal: all in
"answer", a quarter in "both". A fourth, "every", has both losses and all refusals, so that it differs from "answer" in the projection
alone. A file a part of the question; one seed a call, all seeds in a folder are pooled.

begun.py    answers that are made to begin with words of compliance
depth.py    what a border moves at each layer; what is said when the refusal's first token cannot be
turns.py    asking on after a refusal
unseen.py   kinds of harm, forms of picture and wordings that training never met
splits.py   what borders train on there, and what they are tested on
curve.py    resistance over utility, by lambda and steps; curve_table.py: its figures
borders.py  the four borders, additive noise by the three objectives, and outcomes of several seeds as one table
"""
