# A chave da mensagem, com hifens no lugar dos pontos, é o id aqui: goodbye.14_days é goodbye-14_days.
# Com carinho, sem pressão, no máximo um emoji por mensagem. Cada idioma tem os mesmos ids com as mesmas variáveis.

## Despedida, depois de dias de silêncio

# $name: primeiro nome. $days: há quantos dias não temos notícias.
goodbye-14_days =
    Oi, { $name }! Faz { $days ->
        [1] um dia
       *[other] { $days } dias
    } que não temos notícias suas, e tudo bem. Não queremos encher sua conversa, então vamos ficar quietinhos por aqui. 👋

    { goodbye-answers }

goodbye-30_days =
    Oi, { $name }! Já faz { $days ->
        [1] um dia
       *[other] { $days } dias
    } desde a nossa última conversa. A vida é corrida, a gente sabe. Por enquanto, esta é a nossa despedida; volte quando quiser. 👋

    { goodbye-answers }

# As três respostas que o sistema entende.
goodbye-answers =
    Se preferir outra coisa, é só responder com um número:
    1 – Vamos manter contato
    2 – Fazer uma pausa, e me pergunte de novo mais tarde
    3 – Parar, não quero mais mensagens

    Não responder também está ótimo.

## Resumo da semana

# $name: primeiro nome. $done, $open: quantas coisas foram concluídas, e quantas faltam.
# Em português a categoria [one] vale também para zero: por isso [0] vem antes.
weekly_review-summary =
    Oi, { $name }! Aqui vai a sua semana em poucas palavras. { $done ->
        [0] Nada foi concluído, e tudo bem: há semanas assim.
        [one] Você concluiu uma coisa.
       *[other] Você concluiu { $done } coisas. 🌱
    } { $open ->
        [0] Não há nada esperando por você.
        [one] Uma coisa ainda está em aberto; ela pode esperar o seu tempo.
       *[other] { $open } coisas ainda estão em aberto; elas podem esperar o seu tempo.
    }

## Lembretes

# $name: primeiro nome. $at: hora do dia, como texto.
reminder-appointment =
    Oi, { $name }! Um lembrete rápido: seu compromisso é às { $at }. Se não der mais certo, é só avisar. ⏰

# $name: o nome do grupo. $at: hora do dia, como texto.
reminder-meeting =
    Olá, { $name }! Nosso encontro é hoje, às { $at }. Venha como estiver. ⏰

# $name: primeiro nome. $day: a data, como texto ISO 8601.
reminder-day =
    Oi, { $name }! Um lembrete rápido: { DATETIME($day, dateStyle: "full") }. Se não der mais certo, é só avisar.
