// What S3 has and nginx has not: requests signed with AWS Signature Version 4, and ListObjectsV2.
// The objects' bytes never pass through here.
import crypto from 'crypto';
import fs from 'fs';

// Derived from the secret, the day, the region and the service, which a whole run shares.
const signingKeys = {};

function hmac(key, message) {
    return crypto.createHmac('sha256', key).update(message);
}

function signingKey(secret, scope) {
    const id = secret + ' ' + scope;
    if (!signingKeys[id]) {
        signingKeys[id] = scope.split('/').reduce((key, part) => hmac(key, part).digest(), 'AWS4' + secret);
    }
    return signingKeys[id];
}

// The request as both sides must see it, in the words of the signature's specification: a canonical request.
function canonicalRequest(r, signedHeaders) {
    const target = r.variables.request_uri;
    const mark = target.indexOf('?');
    const query = (mark < 0 ? '' : target.slice(mark + 1)).split('&')
        .filter(pair => pair)
        .map(pair => pair.includes('=') ? pair : pair + '=')
        .sort();
    const headers = signedHeaders.split(';')
        .map(name => `${name}:${(r.headersIn[name] || '').trim().replace(/ +/g, ' ')}\n`);
    return [
        r.variables.request_method,
        mark < 0 ? target : target.slice(0, mark),
        query.join('&'),
        headers.join(''),
        signedHeaders,
        r.headersIn['x-amz-content-sha256'] || 'UNSIGNED-PAYLOAD',
    ].join('\n');
}

function isSigned(r) {
    const fields = {};
    const header = r.headersIn['Authorization'] || '';
    if (!header.startsWith('AWS4-HMAC-SHA256 ')) {
        return false;
    }
    header.slice(17).split(',').forEach(field => {
        const at = field.indexOf('=');
        fields[field.slice(0, at).trim()] = field.slice(at + 1).trim();
    });
    const credential = fields.Credential || '';
    const slash = credential.indexOf('/');
    const scope = credential.slice(slash + 1);
    if (credential.slice(0, slash) !== r.variables.s3_access_key || !fields.SignedHeaders || !fields.Signature) {
        return false;
    }
    const hash = crypto.createHash('sha256').update(canonicalRequest(r, fields.SignedHeaders)).digest('hex');
    const text = ['AWS4-HMAC-SHA256', r.headersIn['x-amz-date'] || '', scope, hash].join('\n');
    return hmac(signingKey(r.variables.s3_secret_key, scope), text).digest('hex') === fields.Signature;
}

// How long this answer is late: one of a hundred ranges is, and the last one of the last object, which every client asks
// for near the end. Whoever asks for that again while somebody waits is served; the next load waits anew.
function stallMs(r) {
    const ms = Number(r.variables.s3_stall_ms);
    const range = r.headersIn.Range;
    if (ms === 0 || !range) {
        return 0;
    }
    if (!r.variables.request_uri.startsWith(r.variables.s3_last_object) || !range.endsWith(r.variables.s3_last_byte)) {
        return Math.random() < 0.01 ? ms : 0;
    }
    const mark = r.variables.s3_last_mark;
    const now = Date.now();
    let then = 0;
    try {
        then = Number(fs.readFileSync(mark));
    } catch (error) {
        // Nobody has waited for it yet.
    }
    if (now - then < ms / 2) {
        return 0;
    }
    fs.writeFileSync(mark, String(now));
    return ms;
}

// For auth_request: 204 lets the request pass. The wait before the first byte happens here, where nothing else waits.
function authorize(r) {
    const status = isSigned(r) ? 204 : 403;
    const waitMs = Number(r.variables.s3_first_byte_ms) + stallMs(r);
    if (waitMs > 0) {
        setTimeout(() => r.return(status), waitMs);
    } else {
        r.return(status);
    }
}

function escapeXml(text) {
    return text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}

// ListObjectsV2, from the list of objects that was written when the server started: [key, size, ETag, date], by key.
function list(r) {
    const prefix = r.args['prefix'] || '';
    const delimiter = r.args['delimiter'] || '';
    const most = Number(r.args['max-keys'] || 1000);
    const after = r.args['continuation-token'] || r.args['start-after'] || '';
    const encoded = r.args['encoding-type'] === 'url';
    const write = encoded ? text => encodeURIComponent(text).replace(/%2F/g, '/') : escapeXml;

    const entries = [];
    let last = after;
    let truncated = false;
    const objects = JSON.parse(fs.readFileSync(r.variables.s3_objects));
    for (let i = 0; i < objects.length; i++) {
        const object = objects[i];
        const key = object[0];
        const cut = delimiter ? key.indexOf(delimiter, prefix.length) : -1;
        const shown = cut < 0 ? key : key.slice(0, cut + delimiter.length);
        if (!key.startsWith(prefix) || shown <= after || (cut >= 0 && shown === last)) {
            continue;
        }
        if (entries.length >= most) {
            truncated = true;
            break;
        }
        last = shown;
        entries.push(cut >= 0
            ? `<CommonPrefixes><Prefix>${write(shown)}</Prefix></CommonPrefixes>`
            : `<Contents><Key>${write(key)}</Key><LastModified>${object[3]}</LastModified>`
                + `<ETag>&quot;${object[2]}&quot;</ETag><Size>${object[1]}</Size>`
                + '<StorageClass>STANDARD</StorageClass></Contents>');
    }
    r.headersOut['Content-Type'] = 'application/xml';
    r.return(200, '<?xml version="1.0" encoding="UTF-8"?>'
        + '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        + `<Name>${r.variables.s3_bucket}</Name><Prefix>${write(prefix)}</Prefix>`
        + (delimiter ? `<Delimiter>${write(delimiter)}</Delimiter>` : '')
        + (encoded ? '<EncodingType>url</EncodingType>' : '')
        + `<MaxKeys>${most}</MaxKeys><KeyCount>${entries.length}</KeyCount><IsTruncated>${truncated}</IsTruncated>`
        // A token stands for the last thing that was listed.
        + (truncated ? `<NextContinuationToken>${escapeXml(last)}</NextContinuationToken>` : '')
        + entries.join('') + '</ListBucketResult>');
}

export default { authorize, list };
