import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion.data.class_names import ClassNames, same_names

GOLDEN_RETRIEVER, TENCH, HEN, CRANE_BIRD, CRANE_MACHINE = (
    "n02099601",
    "n01440764",
    "n01514859",
    "n02012849",
    "n03126707",
)


@pytest.fixture(scope="module")
def imagenet():
    return ClassNames(1000)


# -- the model's own names ---------------------------------------------------------------------------------------------


def test_names_are_found_in_any_case():
    names = ClassNames(3, ["cat", "Dog", "two words"])
    assert names.labels("DOG, cat ,two words,dog") == [1, 0, 2, 1]


def test_labels_are_found_by_number_where_no_name_is_meant():
    assert ClassNames(3, ["cat", "dog", "owl"]).labels("2,0,1,dog") == [2, 0, 1, 1]
    assert ClassNames(3).labels("2,0") == [2, 0]


def test_numbers_that_are_names_win_over_labels():
    names = ClassNames(3, ["2", "10", "300"])
    assert names.labels("2,10,300") == [0, 1, 2]


@pytest.mark.parametrize("class_names, item", [(["1", "2", "3"], "0"), (["001", "002"], "1"), (["7", "cat"], "0")])
def test_where_names_are_numbers_a_number_that_is_none_is_refused(class_names, item):
    names = ClassNames(len(class_names), class_names)
    with pytest.raises(
        ValueError, match=f"^--labels {item}: .* here numbers are names; names are such as {class_names[0]}"
    ):
        names.labels(f"{class_names[0]},{item}")
    assert names.row_of_number(int(item)) is None and ClassNames(3, ["1", "2", "3"]).row_of_number(3) == 2


def test_numbers_are_labels_where_no_name_is_one():
    names = ClassNames(2, ["cat", "dog2"])
    assert [names.row_of_number(number) for number in (0, 1, 2, -1)] == [0, 1, None, None]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_are_found_in_either_form_of_unicode(forms):
    recorded, asked = (unicodedata.normalize(form, "café") for form in forms)
    names = ClassNames(2, [recorded, "thé"])
    assert names.labels(f"{asked},{asked.upper()}") == [0, 0] and names.row(asked) == 0


def test_names_with_commas_can_be_asked_for():
    names = ClassNames(4, ["tench, Tinca tinca", "a", "b", "a,b"])
    assert names.labels("tench, Tinca tinca,b,0") == [0, 2, 0]
    assert names.labels('a,b,"a,b"') == [1, 2, 3] and names.labels('"a"') == [1]
    with pytest.raises(ValueError, match="--labels tench: no class of this name"):
        names.labels("tench, Tinca")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20, unique=True))
def test_every_recorded_number_is_found_as_a_name(numbers):
    names = ClassNames(len(numbers), [str(number) for number in numbers])
    assert names.labels(",".join(map(str, numbers))) == list(range(len(numbers)))


@pytest.mark.parametrize("item", ["3", "1000", "-1"])
def test_a_label_outside_the_classes_is_refused_although_the_table_has_one_more_row(item):
    with pytest.raises(ValueError, match=rf"^--labels {item}: labels are 0 \.\.\. 2$"):
        ClassNames(3, ["cat", "dog", "owl"]).label(item)


def test_an_unknown_name_is_refused_with_some_that_are_known():
    with pytest.raises(ValueError, match="^--labels bird: no class of this name; names are such as cat, dog, owl$"):
        ClassNames(3, ["cat", "dog", "owl"]).label("bird")


def test_an_unknown_name_is_refused_where_no_names_are_known():
    with pytest.raises(ValueError, match="^--labels bird: no class of this name$"):
        ClassNames(3).label("bird")


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_an_empty_list_is_refused(text):
    with pytest.raises(ValueError, match="--labels .*give labels or class names"):
        ClassNames(3).labels(text)


def test_of_names_that_differ_only_in_case_the_exact_one_wins_and_another_spelling_is_refused_naming_all():
    names = ClassNames(3, ["Dog", "cat", "dog"])
    assert names.labels("dog,Dog,CAT") == [2, 0, 1]
    with pytest.raises(ValueError, match=r"--labels DOG: several classes have .* choose one of 0 \(Dog\), 2 \(dog\)$"):
        names.label("DOG")


# -- ImageNet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item, label",
    [
        ("golden retriever", 207),
        ("Golden Retriever", 207),
        ("Labrador retriever", 208),
        ("tench", 0),
        ("Tinca tinca", 0),
        ("toilet tissue", 999),
        ("goldfish", 1),
        ("giant panda", 388),
        (GOLDEN_RETRIEVER, 207),
        ("207", 207),
        ("0", 0),
        ("999", 999),
    ],
)
def test_a_model_of_1000_unnamed_classes_knows_imagenet_in_words_ids_and_numbers(imagenet, item, label):
    assert imagenet.label(item) == label


def test_a_word_of_several_classes_is_refused_with_their_labels(imagenet):
    with pytest.raises(ValueError, match=r"--labels crane: .* choose one of 134 \(crane\), 517 \(crane\)$"):
        imagenet.label("crane")


def test_the_dog_and_the_jacket_of_one_name_are_told_apart_by_case(imagenet):
    assert imagenet.labels("Cardigan,cardigan") == [264, 474]


def test_the_null_class_of_imagenet_cannot_be_asked_for(imagenet):
    with pytest.raises(ValueError, match=r"labels are 0 \.\.\. 999"):
        imagenet.label("1000")


@pytest.mark.parametrize("class_names", [(), [HEN, GOLDEN_RETRIEVER, TENCH], [CRANE_MACHINE, CRANE_BIRD, HEN]])
def test_an_unknown_word_is_refused_with_examples_that_can_be_asked_for(class_names):
    names = ClassNames(len(class_names) or 1000, class_names)
    with pytest.raises(ValueError, match="--labels unicorn: no class of this name; names are such as ") as raised:
        names.label("unicorn")
    examples = str(raised.value).split("such as ")[1]
    assert names.labels(examples)


def test_recorded_wordnet_ids_give_words_their_labels_in_the_recorded_order():
    names = ClassNames(3, [HEN, GOLDEN_RETRIEVER, TENCH])
    assert names.labels(f"golden retriever,hen,tench,{TENCH},0") == [1, 0, 2, 2, 0]
    with pytest.raises(ValueError, match="no class of this name"):
        names.label("goldfish")


def test_a_word_is_ambiguous_only_among_the_recorded_classes():
    assert ClassNames(2, [CRANE_MACHINE, TENCH]).label("crane") == 0
    with pytest.raises(ValueError, match=r"choose one of 0 .*, 1 "):
        ClassNames(2, [CRANE_MACHINE, CRANE_BIRD]).label("crane")


def test_wordnet_ids_that_are_not_of_imagenet_1k_are_still_names():
    assert ClassNames(2, ["n00000001", TENCH]).labels("n00000001,tench") == [0, 1]


@pytest.mark.parametrize(
    "num_classes, class_names", [(999, []), (2, ["cat", TENCH]), (1000, [str(i) for i in range(1000)])]
)
def test_other_models_do_not_know_imagenet(num_classes, class_names):
    with pytest.raises(ValueError, match="no class of this name"):
        ClassNames(num_classes, class_names).label("golden retriever")


def test_numbers_stand_for_the_names_of_the_same_images_alone():
    numbered, named = ["0", "1"], ["cat", "dog"]
    assert same_names(numbered, named, same_images=True) and not same_names(numbered, named)
    assert not same_names(named, ["dog", "cat"], same_images=True)
    assert not same_names(["0", "1", "2"], named, same_images=True)
    assert same_names(["cafe\u0301"], ["caf\u00e9"]) and same_names(None, None) and not same_names(None, named)
