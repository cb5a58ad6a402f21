package org.pytorch.serve;

import io.netty.channel.Channel;
import io.netty.channel.ChannelInitializer;
import io.netty.channel.ChannelOption;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.HttpServerCodec;
import io.netty.handler.ssl.SslContext;
import org.pytorch.serve.http.ExtendedSSLHandler;
import org.pytorch.serve.http.HttpRequestHandler;
import org.pytorch.serve.http.HttpRequestHandlerChain;
import org.pytorch.serve.http.InvalidRequestHandler;
import org.pytorch.serve.http.TokenAuthorizationHandler;
import org.pytorch.serve.http.api.rest.ApiDescriptionRequestHandler;
import org.pytorch.serve.http.api.rest.InferenceRequestHandler;
import org.pytorch.serve.http.api.rest.ManagementRequestHandler;
import org.pytorch.serve.http.api.rest.OpenInferenceProtocolRequestHandler;
import org.pytorch.serve.http.api.rest.PrometheusMetricsRequestHandler;
import org.pytorch.serve.servingsdk.impl.PluginsManager;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.ConnectorType;
import org.pytorch.serve.util.TokenAuthorization;
import org.pytorch.serve.workflow.api.http.WorkflowInferenceRequestHandler;
import org.pytorch.serve.workflow.api.http.WorkflowMgmtRequestHandler;

/**
 * Sets up a client's connection.
 *
 * <p>It takes the place of TorchServe 0.12.0's own class of this name and puts the same handlers in the same order, with
 * ClientErrors before them, and with Exchanges, InOrder and Uploads before the aggregator.
 */
public class ServerInitializer extends ChannelInitializer<Channel> {
    private final SslContext sslContext;
    private final ConnectorType type;

    public ServerInitializer(SslContext sslContext, ConnectorType type) {
        this.sslContext = sslContext;
        this.type = type;
    }

    @Override
    public void initChannel(Channel channel) {
        // TorchServe sets it to 0: an answer's last bytes are thrown away, and the client gets a reset, where they have
        // not arrived when the connection is closed behind them.
        channel.config().setOption(ChannelOption.SO_LINGER, -1);
        ConfigManager config = ConfigManager.getInstance();
        ChannelPipeline pipeline = channel.pipeline();
        if (sslContext != null) {
            pipeline.addLast("ssl", new ExtendedSSLHandler(sslContext, type));
        }
        pipeline.addLast("http", new HttpServerCodec());
        pipeline.addLast("exchanges", new Exchanges());
        pipeline.addLast("inOrder", new InOrder());
        Uploads.addTo(pipeline);
        pipeline.addLast("handler", new HttpRequestHandler(handlers(config)));
    }

    private HttpRequestHandlerChain handlers(ConfigManager config) {
        PluginsManager plugins = PluginsManager.getInstance();
        HttpRequestHandlerChain first = new ClientErrors();
        HttpRequestHandlerChain last = first.setNextHandler(new ApiDescriptionRequestHandler(type));
        if (is(ConnectorType.INFERENCE_CONNECTOR)) {
            last = last.setNextHandler(new TokenAuthorizationHandler(TokenAuthorization.TokenType.INFERENCE));
            last = last.setNextHandler(new InferenceRequestHandler(plugins.getInferenceEndpoints()));
            last = last.setNextHandler(new WorkflowInferenceRequestHandler());
            if (config.isOpenInferenceProtocol()) {
                last = last.setNextHandler(new OpenInferenceProtocolRequestHandler());
            }
        }
        if (is(ConnectorType.MANAGEMENT_CONNECTOR)) {
            last = last.setNextHandler(new TokenAuthorizationHandler(TokenAuthorization.TokenType.MANAGEMENT));
            last = last.setNextHandler(new ManagementRequestHandler(plugins.getManagementEndpoints()));
            last = last.setNextHandler(new WorkflowMgmtRequestHandler());
        }
        if (type == ConnectorType.METRICS_CONNECTOR || config.isMetricApiEnable() && type == ConnectorType.ALL) {
            last = last.setNextHandler(new PrometheusMetricsRequestHandler());
        }
        last.setNextHandler(new InvalidRequestHandler());
        return first;
    }

    private boolean is(ConnectorType wanted) {
        return type == wanted || type == ConnectorType.ALL;
    }
}
