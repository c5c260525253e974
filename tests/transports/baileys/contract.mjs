// Reads {ids, jids, text} as JSON from standard input, and writes what Baileys makes of them.
import {
  decodeBinaryNode,
  encodeBinaryNode,
  generateMessageIDV2,
  generateWAMessage,
  isJidBroadcast,
  isJidGroup,
  isJidNewsletter,
  isLidUser,
  isPnUser,
  jidDecode,
  jidEncode,
  jidNormalizedUser
} from '@whiskeysockets/baileys'

const ME = '5511900000000@s.whatsapp.net'

let input = ''
for await (const chunk of process.stdin) input += chunk
const { ids, jids, text } = JSON.parse(input)

// What sendMessage does with messageId, and the frame that it writes then, read back.
const messageOf = async (id, jid) => {
  const message = await generateWAMessage(jid, { text }, { userJid: ME, messageId: id })
  const frame = encodeBinaryNode({ tag: 'message', attrs: { to: jid, id: message.key.id, type: 'text' } })
  const { attrs } = await decodeBinaryNode(frame)
  return { id: message.key.id, to: message.key.remoteJid, text: message.message.extendedTextMessage.text, wire: attrs }
}

const readingOf = jid => {
  const { user, server, device } = jidDecode(jid) ?? {}
  return {
    isPnUser: !!isPnUser(jid),
    isLidUser: !!isLidUser(jid),
    isJidGroup: !!isJidGroup(jid),
    isOther: !!isJidBroadcast(jid) || !!isJidNewsletter(jid),
    isNormal: jidNormalizedUser(jid) === jid && jidEncode(user, server) === jid && device === undefined
  }
}

const result = {
  own: Array.from({ length: 20 }, () => generateMessageIDV2(ME)),
  messages: await Promise.all(ids.flatMap(id => jids.map(jid => messageOf(id, jid)))),
  readings: Object.fromEntries(jids.map(jid => [jid, readingOf(jid)]))
}
process.stdout.write(JSON.stringify(result), () => process.exit(0))
