# A message key with its dots as hyphens is the id here: goodbye.14_days is goodbye-14_days.
# Warm, no pressure, at most one emoji in a message. Every locale has the same ids with the same variables.

## Goodbye, after quiet days

# $name: first name. $days: how many days there was no word from the person.
goodbye-14_days =
    Hi { $name }, we have not heard from you for { $days ->
        [1] a day
       *[other] { $days } days
    }, and that is perfectly fine. We do not want to fill your chat, so we will be quiet now. 👋

    { goodbye-answers }

goodbye-30_days =
    Hi { $name }, it has been { $days ->
        [1] a day
       *[other] { $days } days
    } since we last spoke. Life is full, we know. This is our goodbye for now; you are welcome back whenever you like. 👋

    { goodbye-answers }

# The three answers that the host understands.
goodbye-answers =
    If you want something else, just answer with a number:
    1 – Let's keep in touch
    2 – Pause for now, and ask me again later
    3 – Stop, please do not write again

    No answer is fine too.

## Weekly review

# $name: first name. $done, $open: how many things were finished, and are left.
weekly_review-summary =
    Hi { $name }, here is your week in short. { $done ->
        [0] Nothing got finished, and that is all right: some weeks are like that.
        [one] You finished one thing.
       *[other] You finished { $done } things. 🌱
    } { $open ->
        [0] Nothing is waiting for you.
        [one] One thing is still open; it can wait until it suits you.
       *[other] { $open } things are still open; they can wait until it suits you.
    }

## Reminders

# $name: first name. $at: time of day, as text.
reminder-appointment =
    Hi { $name }, a small reminder: your appointment is at { $at }. If it does not suit you any more, just tell us. ⏰

# $name: what the group is called. $at: time of day, as text.
reminder-meeting =
    Hello { $name }! We meet today at { $at }. Come as you are. ⏰

# $name: first name. $day: the date, as ISO 8601 text.
reminder-day =
    Hi { $name }, a small reminder of { DATETIME($day, dateStyle: "full") }. If it does not suit you any more, just tell us.
