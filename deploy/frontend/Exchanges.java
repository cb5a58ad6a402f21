package org.pytorch.serve;

import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpStatusClass;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.HttpVersion;
import io.netty.handler.codec.http.LastHttpContent;
import java.nio.charset.StandardCharsets;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;

/**
 * What one client's connection has asked for and not got yet, and, over all connections, the wait for it.
 *
 * <p>A request counts from its last header until its answer is in the system's hands, whatever it waits for between:
 * its body, the model's queue, a worker. One of these sits in the pipeline of each connection; ServerInitializer puts
 * it there, ServerGroups waits.
 */
public final class Exchanges extends ChannelDuplexHandler {
    // Of what was on its way when the wait began, and has not been read.
    private static final long QUIET_NS = TimeUnit.SECONDS.toNanos(1);
    private static final long POLL_MS = 20;
    private static final long REFUSAL_NS = TimeUnit.SECONDS.toNanos(2);
    private static final String STOPPING =
            "{\"error\": {\"code\": \"stopping\", \"message\": \"The server stops and could not answer in time; "
                    + "try again.\"}}";

    private static final Set<Exchanges> BUSY = ConcurrentHashMap.newKeySet();
    private static volatile boolean draining;

    // All used by the connection's own thread only.
    private ChannelHandlerContext context;
    private int unanswered;
    private int written;
    private boolean saidLast;

    /**
     * Waits until every request is answered, and closes each connection behind its answer.
     *
     * <p>Nobody accepts connections any more. Those that are open may ask once more: a request that was on its way is
     * answered too.
     *
     * @param mostNs for how long; what is not answered by then gets 503
     * @return how many connections got that
     */
    public static int drain(long mostNs) throws InterruptedException {
        draining = true;
        long began = System.nanoTime();
        long quietSince = began;
        while (System.nanoTime() - began < mostNs) {
            Thread.sleep(POLL_MS);
            if (!BUSY.isEmpty()) {
                quietSince = System.nanoTime();
            } else if (System.nanoTime() - quietSince >= QUIET_NS) {
                return 0;
            }
        }
        int refused = BUSY.size();
        for (Exchanges one : BUSY) {
            one.context.executor().execute(one::refuse);
        }
        long refusedAt = System.nanoTime();
        while (!BUSY.isEmpty() && System.nanoTime() - refusedAt < REFUSAL_NS) {
            Thread.sleep(POLL_MS);
        }
        return refused;
    }

    @Override
    public void handlerAdded(ChannelHandlerContext ctx) {
        context = ctx;
    }

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        if (message instanceof HttpRequest) {
            unanswered++;
            BUSY.add(this);
        }
        ctx.fireChannelRead(message);
    }

    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        boolean interim = isInterim(message);
        if (draining && !interim && message instanceof HttpResponse && unanswered <= 1) {
            HttpUtil.setKeepAlive((HttpResponse) message, false);
            saidLast = true;
        }
        if (!interim && message instanceof LastHttpContent && unanswered > 0) {
            unanswered--;
            written++;
            ctx.write(message, promise.unvoid().addListener(future -> gone()));
        } else {
            ctx.write(message, promise);
        }
    }

    @Override
    public void channelInactive(ChannelHandlerContext ctx) {
        unanswered = 0;
        written = 0;
        BUSY.remove(this);
        ctx.fireChannelInactive();
    }

    /** An answer is in the system's hands, or its client has left. */
    private void gone() {
        written--;
        if (written > 0) {
            return;
        }
        if (saidLast) {
            // A client whose answer went out just before the wait began may be asking again already.
            context.channel().close(); // and busy until it is closed
        } else if (unanswered <= 0) {
            BUSY.remove(this);
        }
    }

    private void refuse() {
        if (unanswered == 0) {
            return; // its answer is on its way
        }
        unanswered = 1; // what came behind it is not looked at any more
        context.channel().writeAndFlush(refusal(HttpResponseStatus.SERVICE_UNAVAILABLE, STOPPING));
    }

    /** An answer of the frontend's own, a JSON document, behind which the connection is closed. */
    static FullHttpResponse refusal(HttpResponseStatus status, String document) {
        FullHttpResponse answer =
                new DefaultFullHttpResponse(
                        HttpVersion.HTTP_1_1, status, Unpooled.copiedBuffer(document, StandardCharsets.UTF_8));
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_JSON);
        HttpUtil.setContentLength(answer, answer.content().readableBytes());
        HttpUtil.setKeepAlive(answer, false);
        return answer;
    }

    /** Whether it only says that the answer is still to come, as 100 Continue does. */
    static boolean isInterim(Object message) {
        return message instanceof HttpResponse
                && ((HttpResponse) message).status().codeClass() == HttpStatusClass.INFORMATIONAL;
    }
}
